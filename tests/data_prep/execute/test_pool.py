"""The pool: order, errors, deaths and retries, with real processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatrain.data_prep.execute import ExecuteConfig, Failure, each
from megatrain.data_prep.execute.pool import in_order
from megatrain.data_prep.execute.tasks import WorkerDiedError
from megatrain.errors import GaveUp
from tests.data_prep.execute.work import Task, attempts, do, done, squares


def square(number: int) -> tuple[int, int]:
    """Early tasks take longest. A negative number fails, a large one kills its process."""
    if number < 0:
        raise GaveUp(f"{number} is negative")
    if number > 100:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01 * (6 - number))
    return number**2, os.getpid()


def test_results_are_in_order_and_from_several_processes() -> None:
    found = list(in_order(square, range(6), 2))
    assert [result for result, _ in found] == [0, 1, 4, 9, 16, 25]
    processes = {process for _, process in found}
    assert len(processes) == 2
    assert os.getpid() not in processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_an_error_is_raised_here_and_a_death_names_its_task() -> None:
    with pytest.raises(GaveUp) as gave_up:
        list(in_order(square, [0, -1, 2], 2))
    assert str(gave_up.value) == "-1 is negative"
    with pytest.raises(WorkerDiedError) as died:
        list(in_order(square, [0, 1, 2, 101], 2))
    assert died.value.task == 3


def test_what_fails_is_tried_again_then_named_and_the_rest_is_done(tmp_path: Path) -> None:
    folder = str(tmp_path)
    special = {
        1: Task(1, folder, "raise"),
        2: Task(2, folder, "raise", failing=1),
        3: Task(3, folder, "die"),
        4: Task(4, folder, "die", failing=1),
        5: Task(5, folder, "exit"),
    }
    tasks = [special.get(number, Task(number, folder)) for number in range(12)]
    found = dict(each(do, tasks, ExecuteConfig(workers=2, retries=1), tmp_path))
    failures = [found.pop(number) for number in (1, 3, 5)]
    assert found == {number: value for number, value in squares(12).items() if number not in (1, 3, 5)}
    assert [(failure.reason, failure.attempts) for failure in failures if isinstance(failure, Failure)] == [
        ("ValueError: 1 is bad", 2),
        ("its process was killed, maybe for lack of memory", 2),
        ("its process ended with exit code 7", 2),
    ]
    assert [len(attempts(tmp_path, number)) for number in range(7)] == [1, 2, 2, 2, 2, 2, 1]


def test_giving_up_ends_all_at_once(tmp_path: Path) -> None:
    tasks = [Task(0, str(tmp_path), "give up"), *(Task(number, str(tmp_path), seconds=5) for number in range(1, 9))]
    started = time.monotonic()
    with pytest.raises(GaveUp, match="the disk is full"):
        list(each(do, tasks, ExecuteConfig(workers=2), tmp_path))
    assert time.monotonic() - started < 30
    assert done(tmp_path) == {}
    assert _workers(os.getpid()) == []


def test_memory_is_bounded_where_asked(tmp_path: Path) -> None:
    tasks = [Task(0, str(tmp_path), "allocate"), Task(1, str(tmp_path))]
    config = ExecuteConfig(workers=1, retries=0, worker_memory_bytes=256 << 20)
    found = dict(each(do, tasks, config, tmp_path))
    assert found[1] == 1
    assert isinstance(found[0], Failure)
    assert found[0].reason == "MemoryError"


@pytest.mark.parametrize("seed", [0, 1])
def test_workers_killed_at_random_moments_change_nothing(seed: int, tmp_path: Path) -> None:
    """Each time a result comes, one of the workers may be killed: idle, starting or at work."""
    chance = random.Random(seed)
    tasks = [Task(number, str(tmp_path), seconds=chance.uniform(0, 0.03)) for number in range(40)]
    found, kills = {}, 0
    for number, result in each(do, tasks, ExecuteConfig(workers=2, retries=20), tmp_path):
        found[number] = result
        if chance.random() < 0.2 and (workers := _workers(os.getpid())):
            time.sleep(chance.uniform(0, 0.05))
            chance.choice(workers).kill()
            kills += 1
    assert kills > 3
    assert found == done(tmp_path) == squares(40)
    assert sum(len(attempts(tmp_path, number)) for number in range(40)) <= 40 + kills


def _workers(process: int) -> list[psutil.Process]:
    children = psutil.Process(process).children()
    return [child for child in children if "spawn_main" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it was killed before
        return ""


PARENT = """
import sys
from pathlib import Path
from megatrain.data_prep.execute import ExecuteConfig, each
from tests.data_prep.execute.work import Task, do
tasks = [Task(number, sys.argv[1], seconds=60 * (number > 1)) for number in range(4)]
for result in each(do, tasks, ExecuteConfig(workers=2), Path(sys.argv[1])):
    print(result, flush=True)
"""


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert {parent.stdout.readline(), parent.stdout.readline()} == {"(0, 0)\n", "(1, 1)\n"}
        workers = _workers(parent.pid)
        assert len(workers) == 2
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
