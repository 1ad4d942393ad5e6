"""What all tests share: the pool of ranks, an S3 server, quiet libraries, and which tests run where."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import megatrain.engines  # noqa: F401  (says what DeepSpeed runs on, before anything imports it)
from megatrain import device
from tests.distributed.pool import Pool
from tests.s3 import S3Server, serve

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)  # Before -m chooses by marker.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts processes as distributed, and skips what needs a GPU where there is none."""
    for item in items:
        if item.path.parent.name == "chaos":
            item.add_marker(pytest.mark.chaos)
        if "pool" in getattr(item, "fixturenames", ()) or item.path.parent.name in ("distributed", "chaos"):
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(size): a file system of so many bytes."""
    disk = tmp_path / "disk"

    def mount(size: int) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs needs root")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """Takes all the space that a file system has left; the file to remove for it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast
