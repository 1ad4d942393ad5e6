"""A rank, or every process at once, is killed at a named call inside a save of the real command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import step_folder
from tests.chaos.runs import Dying, Point, Reference, injected, start

pytestmark = pytest.mark.timeout(400)

SPANNING = (
    Point(0, "before mkdir step", everyone=True),
    Point(0, "before open step/rank_00000.bin"),
    Point(1, "before write step/rank_00001.bin, number 2"),
    Point(1, "before fsync step/rank_00001.bin", everyone=True),
    Point(1, "after fsync step"),
    Point(0, "after fsync step/state.json", everyone=True),
    Point(0, "before fsync step/temporary"),
    Point(0, "before replace step/commit.json", everyone=True),
    Point(0, "after replace step/commit.json"),
    Point(0, "after fsync step, number 3", everyone=True),
    Point(0, "before unlink step/commit.json"),
    Point(0, "after unlink step/commit.json", everyone=True),
    Point(0, "before rmdir step", everyone=True),
)
"""Each kind of call, each kind of death, both ranks. Deletions are those of retention."""
BEFORE_THE_COMMIT = Point(0, "before replace step/commit.json", everyone=True)
REPLACING = (
    Point(0, "after rename step.replaced", everyone=True),
    Point(0, "before replace step/commit.json"),
    Point(0, "before unlink step.replaced/commit.json", everyone=True),
)
"""While a step is saved again whose checkpoint is committed and not whole: it stays until the third."""


@pytest.fixture(scope="module")
def dying(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Dying:
    return Dying(reference, tmp_path_factory.mktemp("dying"))


@pytest.mark.parametrize("point", SPANNING, ids=str)
def test_killed_at(point: Point, dying: Dying) -> None:
    dying.die(point)


def test_a_run_that_died_at_them_ends_as_if_it_had_not(dying: Dying) -> None:
    dying.finish()


def test_killed_while_a_checkpoint_is_replaced(reference: Reference, tmp_path: Path) -> None:
    dying = Dying(reference, tmp_path)
    reference.copy(dying.run_dir, steps=(3, 4))
    os.truncate(step_folder(dying.run_dir, 4) / "rank_00001.bin", 1)
    dying.step = 3
    for point in REPLACING:
        dying.die(point)
    dying.finish()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_at_every_point(reference: Reference, tmp_path: Path) -> None:
    dying = Dying(reference, tmp_path)
    dying.die(BEFORE_THE_COMMIT)
    points = every_point(dying, tmp_path / "log")
    assert {point.moment for point in SPANNING} <= {point.moment for point in points}
    for point in points:
        print(point, flush=True)
        if " at start, " in point.moment:
            dying.die(BEFORE_THE_COMMIT)  # Leaves what the start cleans up.
        dying.die(point)
    dying.finish()


def every_point(dying: Dying, log: Path) -> list[Point]:
    """Before each call that changes the disk, where its rank dies, and after it, where all do; of a run that ends."""
    with start(dying.reference.data, dying.run_dir, environment=injected(dying.run_dir, log=str(log))) as command:
        command.succeed()
    dying.runs, dying.step = dying.runs + 1, 0
    points = []
    for line in dict.fromkeys(log.read_text().splitlines()):
        rank, call = line.removeprefix("rank ").split(": ", 1)
        points += [Point(int(rank), f"before {call}"), Point(int(rank), f"after {call}", everyone=True)]
    return points
