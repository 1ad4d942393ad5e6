"""What tests of this folder share: the data, and the run that nothing interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.runs import Reference, start
from tests.distributed.command import write_small_set


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def reference(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    with start(small_set, run_dir) as command:
        command.succeed()
    return Reference(run_dir)
