"""A rank, or every process at once, is killed at a named call inside a save of the real command."""

from __future__ import annotations

import signal
import socket
from itertools import product
from pathlib import Path

import pytest

from megatrain.errors import BUG
from tests.chaos.runs import Point, Reference, injected, start
from tests.distributed.command import Command

pytestmark = pytest.mark.timeout(400)

SPANNING = (
    Point(0, "before mkdir step", everyone=True),
    Point(0, "before open step/rank_00000.bin"),
    Point(1, "before write step/rank_00001.bin at 1048576"),
    Point(1, "before fsync step/rank_00001.bin", everyone=True),
    Point(1, "after fsync step"),
    Point(0, "after fsync step/state.json", everyone=True),
    Point(0, "before fsync step/temporary"),
    Point(0, "before replace step/commit.json", everyone=True),
    Point(0, "after replace step/commit.json"),
    Point(0, "after fsync step, again", everyone=True),
)
"""One or more of each kind of call, each kind of death, both ranks."""


def die(command: Command, point: Point) -> None:
    """Waits for the death at `point` and what the launcher makes of it."""
    finished = command.wait(60)
    killed = f"megatrain train: rank {point.rank} ({socket.gethostname()}) was killed by signal 9\n"
    expected = (-signal.SIGKILL, "") if point.everyone else (BUG, killed)
    assert (finished.code, finished.stderr) == expected, f"{point}: {finished.stdout}"
    assert command.left_over() == []


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one death follows the other."""
    return tmp_path_factory.mktemp("dying") / "run"


@pytest.mark.parametrize("point", SPANNING, ids=str)
def test_killed_at(point: Point, run_dir: Path, small_set: Path, reference: Reference) -> None:
    action = "kill all" if point.everyone else "kill"
    environment = injected(run_dir, rank=point.rank, point=point.moment, action=action)
    with start(small_set, run_dir, environment=environment) as command:
        die(command, point)
    reference.check(run_dir)


def test_the_run_that_died_so_often_ends_as_if_it_had_not(run_dir: Path, small_set: Path, reference: Reference) -> None:
    with start(small_set, run_dir) as command:
        command.succeed()
    assert reference.check(run_dir) == reference.last_step
