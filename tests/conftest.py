"""What all tests share: the pool of ranks, quiet libraries, and which tests run where."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import megatrain.engines  # noqa: F401  (says what DeepSpeed runs on, before anything imports it)
from megatrain import device
from tests.distributed.pool import Pool

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
