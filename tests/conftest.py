"""What all tests share: the pool of ranks, an S3 server, quiet libraries, and which tests run where."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import megatrain.engines  # noqa: F401  (says what DeepSpeed runs on, before anything imports it)
from megatrain import device
from tests.distributed.pool import Pool
from tests.s3 import S3Server, serve

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)  # Before -m chooses by marker.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the pool as distributed, and skips what needs a GPU where there is none."""
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()) or item.path.parent.name == "distributed":
            item.add_marker(pytest.mark.distributed)
        if item.get_closest_marker("gpu") and device.accelerator() != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Real processes, started once for the whole test run."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that this process and those that it starts find."""
    with serve(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
