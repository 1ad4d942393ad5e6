"""Slurm arrays do what the pool does, and lose nothing with a job, a node or the process that waits."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatrain.data_prep.execute import ExecuteConfig, Executor, Failure, each
from megatrain.data_prep.execute.config import SlurmConfig
from megatrain.errors import GaveUp, InputError
from tests.data_prep.execute.work import Task, attempts, do, done, squares
from tests.slurm.conftest import MOST_ARRAY_TASKS, Cluster

pytestmark = pytest.mark.slurm


def config(jobs: int, *extra: str, retries: int = 1) -> ExecuteConfig:
    """One worker a job."""
    return ExecuteConfig(executor=Executor.slurm, retries=retries, slurm=SlurmConfig(tasks=jobs, extra=list(extra)))


def queued() -> str:
    """The jobs that wait or run."""
    return subprocess.run(["squeue", "-h", "-o", "%i %t %j"], check=True, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until condition() is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.usefixtures("slurm")
def test_more_jobs_than_an_array_may_have_and_what_fails_is_named(tmp_path: Path) -> None:
    """One task fails each time, one takes its whole job with it each time, and one only once."""
    folder, jobs = str(tmp_path), MOST_ARRAY_TASKS + 2
    special = {
        2: Task(2, folder, "raise"),
        3: Task(3, folder, "kill the job"),
        4: Task(4, folder, "kill the job", failing=1),
    }
    count = 2 * jobs
    tasks = [special.get(number, Task(number, folder)) for number in range(count)]
    found = dict(each(do, tasks, config(jobs), tmp_path))
    failures = {number: found.pop(number) for number in (2, 3)}
    assert (
        found == done(tmp_path) == {number: value for number, value in squares(count).items() if number not in (2, 3)}
    )
    raised, lost = failures[2], failures[3]
    assert isinstance(raised, Failure)
    assert isinstance(lost, Failure)
    assert (raised.reason, raised.attempts) == ("ValueError: 2 is bad", 2)
    assert lost.reason.startswith("its Slurm job was lost; ")
    assert lost.reason.endswith(".log)")
    assert lost.attempts == 2
    assert [len(attempts(tmp_path, number)) for number in (2, 3, 4)] == [2, 2, 2]
    arrays = {path.stem.split("_")[0] for path in (tmp_path / "slurm").glob("*/0/*.log")}
    assert len(arrays) == 2


START = """
import sys
from pathlib import Path
from megatrain.data_prep.execute import each
from tests.data_prep.execute.work import Task, do
from tests.slurm.test_prep_tasks import config
tasks = [Task(number, sys.argv[1], seconds=600 * (number == 1)) for number in range(6)]
for result in each(do, tasks, config(2), Path(sys.argv[1])):
    print(result, flush=True)
"""


@pytest.mark.usefixtures("slurm")
def test_the_next_start_ends_the_jobs_of_one_that_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", START, str(tmp_path)], stdout=subprocess.PIPE, text=True) as start:
        assert start.stdout is not None
        assert [start.stdout.readline() for _ in range(3)] == ["(0, 0)\n", "(2, 4)\n", "(4, 16)\n"]
        start.kill()
    assert " R megatrain-" in queued()
    tasks = [Task(number, str(tmp_path)) for number in range(6)]
    assert dict(each(do, tasks, config(2), tmp_path)) == done(tmp_path) == squares(6)
    wait_for(lambda: not queued(), 20)


def test_a_node_that_is_lost_loses_no_task(slurm: Cluster, tmp_path: Path) -> None:
    """One job on each node; that of the second node begins again, on the first, where it was."""
    tasks = [Task(number, str(tmp_path), seconds=0 if number < 4 else 2) for number in range(8)]
    working: Iterator[tuple[int, int | Failure]] = each(do, tasks, config(2, "--cpus-per-task=40"), tmp_path)
    found = dict(next(working) for _ in range(4))
    slurm("kill-node", "node2")
    slurm("run", "scontrol", "update", "nodename=node2", "state=down", "reason=lost")  # as Slurm finds out later
    found.update(working)
    slurm("start-node", "node2")
    assert found == done(tmp_path) == squares(8)
    assert sum(len(attempts(tmp_path, number)) for number in range(4)) == 4


@pytest.mark.usefixtures("slurm")
def test_giving_up_cancels_all_jobs(tmp_path: Path) -> None:
    tasks = [Task(0, str(tmp_path), "give up"), Task(1, str(tmp_path), seconds=600)]
    with pytest.raises(GaveUp, match="the disk is full"):
        list(each(do, tasks, config(2), tmp_path))
    wait_for(lambda: not queued(), 20)


@pytest.mark.usefixtures("slurm")
def test_what_the_cluster_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        next(each(do, [Task(0, str(tmp_path))], config(1, "--partition=none"), tmp_path))
    assert str(refused.value).startswith("executor=slurm: ")
    assert "invalid partition" in str(refused.value)
    assert "\n" not in str(refused.value)
