"""Jobs that are stopped, or lose a node, and are requeued, train what an unbroken run trains.

Real jobs by launch/slurm/pretrain.sbatch: two nodes with two processes each, ZeRO-3 over gloo. An unbroken run has as
many processes on one node. All of it is long: of jobs that train, `make test` has test_pipeline_of_jobs.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megatrain.observe.records import read
from tests.distributed.command import curve, train, write_small_set
from tests.slurm.conftest import Cluster
from tests.slurm.jobs import OVERRIDES, STEPS, Job, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

TOLERANCE = 1e-6
"""Law 4's, of loss and gradient norm over TOLERATED_STEPS steps: fp64 with DeepSpeed, which keeps fp32 masters."""
TOLERATED_STEPS = 20

SLOW_STEPS = """
import os, time

if "RANK" in os.environ:
    from megatrain.trainer import Trainer

    after_step = Trainer.after_step

    def slow(self):
        after_step(self)
        time.sleep(0.5)

    Trainer.after_step = slow
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """unbroken(processes, *overrides): the directory of a run that nothing interrupts."""

    @cache
    def run(processes: int, *overrides: str) -> Path:
        run_dir = tmp_path_factory.mktemp("unbroken") / "run"
        with train(data, run_dir, *OVERRIDES, f"max_steps={STEPS}", *overrides, processes=processes) as command:
            command.succeed(timeout=400)
        assert len(curve(run_dir)) == STEPS
        return run_dir

    return run


def cancel_with_signal(job: Job) -> None:
    """Twice, as Slurm does at times."""
    for _ in range(2):
        subprocess.run(["scancel", "--signal=USR1", job.id], check=True)


def requeue(job: Job) -> None:
    subprocess.run(["scontrol", "requeue", job.id], check=True)


def preempt(_job: Job) -> None:
    """By a job of higher priority that wants both nodes for a moment."""
    wants = ["--partition=high", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null"]
    subprocess.run(["sbatch", *wants, "--wrap=sleep 1"], check=True, capture_output=True)


@pytest.mark.long
@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("stop", [cancel_with_signal, requeue, preempt])
def test_a_stopped_job_trains_the_same(
    stop: Callable[[Job], None], data: Path, unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    job = submit(data, tmp_path / "run")
    job.wait_for_step(25)
    stop(job)
    job.wait_for(lambda: job.starts() == 2, "its second start")
    job.succeed()
    assert curve(job.run_dir) == curve(unbroken(4))
    assert job.events("start", "signal", "crash", "resume", "stop") == ["start", "signal", "stop", "resume", "stop"]


@pytest.mark.long
@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--time=5", "--signal=USR1@180"), "SIGUSR1 at rank "),
        (("--time=4", "--signal=CONT@1"), "time limit at rank 0"),
    ],
    ids=["signal", "no signal"],
)
def test_a_job_that_needs_more_time_than_it_may_have(
    options: tuple[str, ...], reason: str, data: Path, unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    """It takes more than 200 seconds."""
    job = submit(data, tmp_path / "run", options=options, python=SLOW_STEPS)
    job.wait_for(lambda: job.starts() >= 2, "its second start", seconds=400)
    job.succeed(seconds=400)
    reasons = [str(event["reason"]) for event in read(job.run_dir / "events.jsonl") if event["event"] == "signal"]
    assert reasons
    assert all(each.startswith(reason) for each in reasons), reasons
    assert job.events("crash") == []
    assert curve(job.run_dir) == curve(unbroken(4))


def continued_from(job: Job) -> int:
    """The step of the second start, which has to be that of the last checkpoint before it."""
    events = [event for event in read(job.run_dir / "events.jsonl") if event["event"] in ("save", "resume")]
    resumed = next(number for number, event in enumerate(events) if event["event"] == "resume")
    step = events[resumed]["step"]
    assert isinstance(step, int)
    assert step == events[resumed - 1]["step"]
    return step


@pytest.mark.long
@pytest.mark.parametrize("node", ["node1", "node2"], ids=["batch", "other"])
def test_a_power_cut(node: str, slurm: Cluster, data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    """Of the node where the script runs, or of the other; it comes back."""
    job = submit(data, tmp_path / "run", options=("--nodelist=node1,node2",))
    job.wait_for_step(45)
    slurm("kill-node", node)
    reached = job.steps()
    try:
        job.wait_for(lambda: job.state() not in ("RUNNING", "COMPLETING"), "Slurm's notice")
    finally:
        slurm("start-node", node)
    job.wait_for(lambda: job.starts() == 2, "its second start")
    job.succeed()
    assert reached - continued_from(job) <= 2 * 20
    assert curve(job.run_dir) == curve(unbroken(4))


@pytest.mark.long
@pytest.mark.parametrize(
    ("nodes", "processes", "overrides"),
    [(2, 2, ()), (3, 1, ("global_batch_size=9", "micro_batch_size=1", "launch.max_idle_share=0.1"))],
    ids=["two to one", "three to two"],
)
def test_a_power_cut_leaves_fewer_nodes(
    nodes: int,
    processes: int,
    overrides: tuple[str, ...],
    slurm: Cluster,
    data: Path,
    unbroken: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The job goes on with what is left: the same batches, the same numbers but for rounding."""
    others = ("--exclude=node3",) if nodes == 2 else ()
    keys = (*overrides, f"launch.processes={processes}")
    job = submit(data, tmp_path / "run", *keys, nodes=f"{nodes - 1}-{nodes}", options=others)
    job.wait_for_step(45)
    slurm("kill-node", f"node{nodes}")
    try:
        job.wait_for(lambda: job.starts() == 2, "its second start")
        job.succeed()
    finally:
        slurm("start-node", f"node{nodes}")
    sizes = [event["world_size"] for event in read(job.run_dir / "events.jsonl") if "world_size" in event]
    assert sizes == [nodes * processes, (nodes - 1) * processes]
    ours, expected = curve(job.run_dir), curve(unbroken(sizes[0], *overrides))
    assert [(step, digest) for step, _, _, digest in ours] == [(step, digest) for step, _, _, digest in expected]
    step = continued_from(job)
    assert ours[:step] == expected[:step]
    for (_, *numbers, _), (_, *wanted, _) in zip(ours[step:][:TOLERATED_STEPS], expected[step:], strict=False):
        assert numbers == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE)
