"""kill -9 of a random process, or of all, at random moments of a busy machine.

A story is a few deaths and the run's end, all drawn from one seed, which is in the name of the test.
MEGATRAIN_CHAOS_SEED=SEED tells one again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from megatrain.errors import BUG
from tests.chaos.runs import Reference, start, starts
from tests.distributed.command import Command

pytestmark = pytest.mark.timeout(600)

DEATHS = 3
STORIES = 10
SEED = "MEGATRAIN_CHAOS_SEED"


def seeds() -> list[int]:
    """New ones in every run of the tests."""
    if SEED in os.environ:
        return [int(os.environ[SEED])]
    return [int.from_bytes(os.urandom(4)) for _ in range(STORIES)]


def short_and_long(values: list[int]) -> list[object]:
    """The first is for `make test`, all are for `make test-chaos`."""
    return [pytest.param(value, marks=[pytest.mark.long] if number else []) for number, value in enumerate(values)]


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Two processes that compute for as long as the test runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("seed", short_and_long(seeds()))
@pytest.mark.usefixtures("busy_machine")
def test_killed_at_random_moments(seed: int, reference: Reference, tmp_path: Path) -> None:
    random = Random(seed)
    run_dir, newest = tmp_path / "run", 0
    for _ in range(DEATHS):
        with start(reference.data, run_dir) as command:
            before = len(starts(run_dir))
            if random.random() < 0.75:
                command.wait_for(lambda: len(starts(run_dir)) > before, "its first event")  # noqa: B023
                seconds = random.uniform(0, 2)
            else:
                seconds = random.uniform(0, 8)
            time.sleep(seconds)
            kill(command, random.choice(["rank 0", "rank 1", "launcher", "all"]))
        assert starts(run_dir)[before:] in ([], [newest])
        one_before, newest = newest, reference.check(run_dir)
        assert newest >= one_before
        print(f"after {seconds:.2f} s; newest whole checkpoint: step {newest}")
    reference.finish(run_dir)


def kill(command: Command, whom: str) -> None:
    """Kills a process, or all, if the command still runs, and checks how it ends."""
    ranks = command.ranks()
    print(f"kill -9 of {whom}, {len(ranks)} ranks live", end=" ")
    if whom == "all":
        command.kill()
    elif whom.startswith("rank") and len(ranks) == 2:
        with suppress(psutil.NoSuchProcess):
            ranks[int(whom[-1])].kill()
    else:
        command.process.kill()
    finished = command.wait()
    assert finished.code in (0, -signal.SIGKILL, BUG), finished
    assert finished.code != BUG or "was killed by signal 9" in finished.stderr, finished
    assert command.left_over() == []
