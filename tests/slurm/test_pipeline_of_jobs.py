"""launch/slurm/pipeline.sh on a real cluster: an array that prepares, a training on two nodes, an evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.observe.records import read
from megatrain.resilience.outcome import read_outcome
from tests.data_prep.sets import write_input
from tests.distributed.command import SMALL

pytestmark = pytest.mark.slurm

PIPELINE = Path(__file__).parents[2] / "launch" / "slurm" / "pipeline.sh"
STEPS = 6


def submit(folder: Path, *words: str) -> list[str]:
    """Starts a pipeline in `folder`, where its jobs' logs come to lie; the jobs' numbers."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(PIPELINE), *words]
    printed = subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True, text=True).stdout
    return [line.rpartition(" ")[2] for line in printed.splitlines()]


def queued() -> dict[str, str]:
    """The state of each job that waits or runs."""
    printed = subprocess.run(["squeue", "-h", "-o", "%i %T"], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in printed.splitlines())


def wait_for_the_end(jobs: list[str], seconds: float, folder: Path) -> None:
    """Until none of the jobs waits or runs."""
    end = time.monotonic() + seconds
    while left := {job: state for job, state in queued().items() if job in jobs}:
        assert time.monotonic() < end, f"{left}\n" + "\n".join(log.read_text() for log in folder.glob("*.log"))
        time.sleep(0.5)


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("slurm")
def test_text_to_scores_by_one_command(tmp_path: Path) -> None:
    write_input(tmp_path)
    run_dir, scores = tmp_path / "run", tmp_path / "scores.json"
    prep = ["input=input", "output=shards", "tokenizer.path=tokenizer.json", "held_out_share=0.1", "slurm.tasks=2"]
    train = ["--nodes=2", *SMALL, "data.path=shards", "run_dir=run", f"max_steps={STEPS}", "launch.processes=1"]
    evaluate = ["checkpoint=run", "data.path=shards", f"output={scores}"]
    jobs = submit(tmp_path, "prep", *prep, "train", *train, "eval", *evaluate)
    wait_for_the_end(jobs, 360, tmp_path)
    logs = {log.name: log.read_text() for log in tmp_path.glob("*.log")}
    outcome = read_outcome(run_dir)
    assert outcome is not None, logs
    assert (outcome.exit_code, outcome.step) == (0, STEPS), logs
    assert "start 1 on 2 nodes: node1 node2\n" in logs[f"megatrain-{jobs[1]}.log"]
    losses = [record["loss"] for record in read(run_dir / "metrics.jsonl")]
    assert len(losses) == STEPS
    assert 0 < json.loads(scores.read_text())["loss"] < losses[0], logs


@pytest.mark.usefixtures("slurm")
def test_what_waits_for_a_job_that_failed_is_cancelled(tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    train = ["--nodes=1", "model=tiny", "data.path=none", "run_dir=run", "max_steps=1"]
    jobs = submit(tmp_path, "train", *train, "eval", "checkpoint=run", "text=none", f"output={scores}")
    wait_for_the_end(jobs, 100, tmp_path)
    log = (tmp_path / f"megatrain-{jobs[0]}.log").read_text()
    assert "\nmegatrain train: " in log
    assert log.endswith("exit code 2\n")
    assert not list(tmp_path.glob("megatrain-eval-*.log"))
