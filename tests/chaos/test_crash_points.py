"""A rank, or every process at once, is killed at a named call inside a save of the real command."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.chaos.runs import Dying, Point, Reference, injected, start

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
    Point(0, "after fsync step, number 2", everyone=True),
    Point(0, "before unlink step/commit.json"),
    Point(0, "after unlink step/commit.json", everyone=True),
    Point(0, "before rmdir step", everyone=True),
)
"""Each kind of call, each kind of death, both ranks. Deletions are those of retention."""
BEFORE_THE_COMMIT = Point(0, "before replace step/commit.json", everyone=True)


@pytest.fixture(scope="module")
def dying(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Dying:
    return Dying(reference, tmp_path_factory.mktemp("dying"))


@pytest.mark.parametrize("point", SPANNING, ids=str)
def test_killed_at(point: Point, dying: Dying) -> None:
    dying.die(point)


def test_a_run_that_died_at_them_ends_as_if_it_had_not(dying: Dying) -> None:
    dying.finish()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("everyone", [False, True], ids=["the rank alone", "all"])
def test_killed_at_every_point(everyone: bool, reference: Reference, tmp_path: Path) -> None:
    dying = Dying(reference, tmp_path)
    dying.die(BEFORE_THE_COMMIT)
    points = every_point(dying, tmp_path / "log", everyone)
    assert {point.moment for point in SPANNING} <= {point.moment for point in points}
    for point in points:
        print(point, flush=True)
        if point.moment.startswith(("before at start", "after at start")):
            dying.die(BEFORE_THE_COMMIT)  # Leaves what the start cleans up.
        dying.die(point)
    dying.finish()


def every_point(dying: Dying, log: Path, everyone: bool) -> list[Point]:
    """Before and after each call that changes the disk, from a start that cleans up, to the run's end."""
    with start(dying.reference.data, dying.run_dir, environment=injected(dying.run_dir, log=str(log))) as command:
        command.succeed()
    dying.runs, dying.step = dying.runs + 1, 0
    calls = dict.fromkeys(log.read_text().splitlines())
    named = [call.removeprefix("rank ").split(": ", 1) for call in calls]
    return [Point(int(rank), f"{when} {name}", everyone) for (rank, name), when in product(named, ("before", "after"))]
