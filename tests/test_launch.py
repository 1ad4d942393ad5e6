"""The scripts of launch/: they parse, and what they are given reaches megatrain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), *sorted(LAUNCH.rglob("*.sbatch"))]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `megatrain` and `srun` print their arguments, a line each, and end with $CODE; scontrol its own."""
    programs = {
        "megatrain": 'printf "%s\\n" "$@"; exit "${CODE:-0}"',
        "srun": 'printf "%s\\n" "$@"; exit "${CODE:-0}"',
        "scontrol": 'if [[ $1 == show ]]; then printf "%s\\n" node7 node8; else echo "scontrol $*"; fi',
        "sleep": ":",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(LAUNCH)))
def test_a_script_parses_and_fails_on_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()


def test_single_node_is_megatrain_train() -> None:
    bin_folder = Path(sys.executable).parent
    ended = run("torchrun/single_node.sh", "--help", **{**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"})
    assert ended.returncode == 0, ended.stderr
    assert "max_steps" in ended.stdout


def test_arguments_and_the_exit_code_pass_through(environment: dict[str, str]) -> None:
    ended = run("torchrun/single_node.sh", "run_dir=a b", "data.path=x=*", CODE="75", **environment)
    assert ended.stdout.splitlines() == ["train", "run_dir=a b", "data.path=x=*"]
    assert ended.returncode == 75


def test_multi_node_says_where_to_meet(environment: dict[str, str]) -> None:
    ended = run("torchrun/multi_node.sh", "run_dir=r", NODES="4", RENDEZVOUS="node1:29500", **environment)
    assert ended.stdout.splitlines() == ["train", "launch.nodes=4", "launch.rendezvous=node1:29500", "run_dir=r"]
    for missing in ("NODES", "RENDEZVOUS"):
        given = {"NODES": "4", "RENDEZVOUS": "node1:29500"}
        del given[missing]
        ended = run("torchrun/multi_node.sh", "run_dir=r", **given, **environment)
        assert ended.returncode != 0
        assert f"{missing}: is needed" in ended.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_a_job_is_requeued_when_it_was_stopped_and_only_then(environment: dict[str, str], code: int) -> None:
    """What a cluster does with it is Slurm's; here are the step's command line and the decision."""
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]"}
    ended = run("slurm/pretrain.sbatch", "run_dir=r", CODE=str(code), **job, **environment)
    lines = ended.stdout.splitlines()
    step = lines[lines.index("megatrain") :]
    assert step[:5] == ["megatrain", "train", "launch.nodes=2", "launch.rendezvous=node7:22345", "run_dir=r"]
    assert ("scontrol requeue 12345" in lines) == (code == 75)
    assert ended.returncode == code
