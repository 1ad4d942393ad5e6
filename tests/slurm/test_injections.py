"""Thirty seeded ways in which a job goes wrong: each is noticed in time and recovered from; nothing wrong goes unsaid.

Real jobs on two nodes with two processes each (injections.py). The table of what happened is printed at the end, and
written to build/injections.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import step_folder
from megatrain.errors import DONE
from tests.chaos.runs import assert_same
from tests.distributed.command import ROOT, curve, train, write_small_set
from tests.slurm.conftest import Cluster
from tests.slurm.injections import KINDS, STEPS, Found, Scene, events, trained_twice
from tests.slurm.jobs import OVERRIDES, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SEEDS = (0, 1, 2)
SHORT = ("killed rank", 0)
"""The one of `make test`."""
HEADER = "| injection | seed | layout | noticed after | bound | what was said | lost steps | starts | end |\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """unbroken(layout): the directory of a run that nothing goes wrong with, on one node."""

    @cache
    def run(layout: str) -> Path:
        run_dir = tmp_path_factory.mktemp("unbroken") / "run"
        with train(data, run_dir, *OVERRIDES, f"max_steps={STEPS}", layout, processes=4) as command:
            finished = command.wait(timeout=400)
        assert finished.code == DONE, finished  # It may have named a rank that is slow, on a busy machine.
        return run_dir

    return run


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """Its lines, for who reads the results."""
    lines = [HEADER, f"|{'---|' * 9}\n"]
    yield lines
    path = ROOT / "build" / "injections.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines))
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    reporter.write("\n" + "".join(lines))


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=() if (kind, seed) == SHORT else pytest.mark.long)
        for kind in KINDS
        for seed in SEEDS
    ],
)
def test_injection(
    kind: str,
    seed: int,
    slurm: Cluster,
    small_disk_of_nodes: Path,
    data: Path,
    unbroken: Callable[[str], Path],
    table: list[str],
    tmp_path: Path,
) -> None:
    scene = Scene(kind, seed, slurm, tmp_path, small_disk_of_nodes, data)
    expected = unbroken(scene.layout)
    act, bound = KINDS[kind]
    found = act(scene)
    job = scene.job
    job.succeed()
    assert job.starts() == found.starts or (found.more and job.starts() > found.starts)
    assert found.seconds is None or 0 <= found.seconds < bound
    if found.changed:
        check_recorded(job, scene.step, expected, found)
    else:
        assert curve(job.run_dir) == curve(expected)
        assert_same(step_folder(job.run_dir, STEPS), step_folder(expected, STEPS))
    table.append(line(scene, found, bound))


def check_recorded(job: Job, step: int, expected: Path, found: Found) -> None:
    """Up to the bad step the run is the unbroken one, and what it did then is in its events; batches are as planned."""
    ours, theirs = curve(job.run_dir), curve(expected)
    assert len(ours) == STEPS
    same = next(number for number in range(STEPS) if ours[number] != theirs[number])
    recorded = events(job, "skip", "rollback", "segment")
    assert tuple(dict.fromkeys(event["event"] for event in recorded)) == found.changed
    if "rollback" not in found.changed:
        assert same + 1 == step
        assert [digest for *_, digest in ours] == [digest for *_, digest in theirs]
        return
    went_back = next(event["step"] for event in recorded if event["event"] == "rollback")
    assert same == went_back
    skipped = found.untrained
    assert [row[-1] for row in ours[same:]][: STEPS - same - skipped] == [row[-1] for row in theirs[same + skipped :]]


def line(scene: Scene, found: Found, bound: float) -> str:
    """A row of the table."""
    layout = scene.layout.removeprefix("engine").lstrip("=.")
    seconds = "" if found.seconds is None else f"{found.seconds:.1f} s"
    end = f"recorded: {', '.join(found.changed)}" if found.changed else "bit-equal"
    lost = found.untrained + trained_twice(scene.job)
    cells = (scene.kind, scene.seed, layout, seconds, f"{bound:.0f} s", found.said, lost, scene.job.starts(), end)
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"
