"""A set that a Slurm array makes has the bytes of the one that a process makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.data_prep.execute import Executor
from megatrain.data_prep.execute.config import SlurmConfig
from tests.data_prep.sets import prepare, write_input

pytestmark = pytest.mark.slurm


@pytest.mark.usefixtures("slurm")
def test_the_set_of_an_array(tmp_path: Path) -> None:
    write_input(tmp_path)
    made_by_one = prepare(tmp_path, tmp_path / "one", workers=1)
    assert prepare(tmp_path, tmp_path / "array", executor=Executor.slurm, slurm=SlurmConfig(tasks=3)) == made_by_one
