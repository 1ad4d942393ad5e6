"""launch/slurm/pretrain.sbatch on a real cluster that has a bad node."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.test_pipeline_of_jobs import wait_for_the_end

pytestmark = pytest.mark.slurm

PRETRAIN = Path(__file__).parents[2] / "launch" / "slurm" / "pretrain.sbatch"
CRASHES_ON_NODE1 = """#!/bin/bash
if [[ $SLURMD_NODENAME != node1 ]]; then exit 0; fi
mkdir -p run
echo '{"exit_code": 1, "reason": "rank 0 (node1) was killed by signal 9", "time": '"$(date +%s)"'}' > run/outcome.json
exit 1
"""
"""In megatrain's place: what is seen here is what Slurm does when it is told to leave a node out."""


@pytest.mark.long
@pytest.mark.usefixtures("slurm")
def test_a_node_that_crashes_two_starts_is_left_out_of_the_third(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "megatrain").write_text(CRASHES_ON_NODE1)
    (tmp_path / "bin" / "megatrain").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", "--nodes=1", "--output=job.log", str(PRETRAIN), "run_dir=run"]
    printed = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    wait_for_the_end([printed.stdout.strip()], 110, tmp_path)
    log = (tmp_path / "job.log").read_text()
    starts = re.findall(r"start (\d) on 1 nodes: (\w+)", log)
    assert starts == [("1", "node1"), ("2", "node1"), ("3", "node2")], log
    assert "left out from now on: node1\n" in log
    assert log.endswith("exit code 0\n")
