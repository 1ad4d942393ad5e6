"""What tests of this folder share: the data, and the run that nothing interrupted."""

from __future__ import annotations

import pytest

from tests.chaos.runs import Reference, start
from tests.distributed.command import write_small_set


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """It keeps the checkpoint of every step."""
    folder = tmp_path_factory.mktemp("reference")
    data, run_dir = write_small_set(folder / "set"), folder / "run"
    with start(data, run_dir, "saving.keep_last=0") as command:
        command.succeed()
    return Reference(data, run_dir)
