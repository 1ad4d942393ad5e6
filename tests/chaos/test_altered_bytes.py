"""Bits that flip and files that end early, in the newest checkpoint: it is never loaded, the one before it is."""

from __future__ import annotations

import math
import os
import shutil
from itertools import product
from pathlib import Path
from random import Random
from typing import cast

import pytest

from megatrain.checkpoint.folders import step_folder
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.engines.ranges import ShardReader
from megatrain.errors import GAVE_UP, GaveUp
from megatrain.observe.records import read
from tests.chaos.runs import STEPS, Reference, start
from tests.checkpoint.layouts import STATES, even_layout, random_whole, write

pytestmark = pytest.mark.timeout(400)

PLACES = 100
SHAPES: dict[str, tuple[int, ...]] = {"embedding": (300, 64), "head": (64, 300)}
OLDER, NEWEST = 10, 20


def seed() -> int:
    """Another one in every run of the tests; printed, which shows where a test fails."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    return seed


def alter(folder: Path, random: Random) -> str:
    """Flips a bit of some file of a checkpoint, or cuts the file off somewhere; says which."""
    path = random.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    if random.random() < 0.5:
        data[place] ^= 1 << random.randrange(8)
        done = f"a bit of byte {place} of {path} flipped"
    else:
        del data[place:]
        done = f"{path} cut off at {place}"
    path.write_bytes(data)
    print(done)
    return done


def load_all(reader: ShardReader) -> None:
    """What all ranks together read."""
    for state, (name, shape) in product(STATES, SHAPES.items()):
        reader.read(state, name, 0, math.prod(shape))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    for step in (OLDER, NEWEST):
        write(step_folder(run_dir, step), even_layout(SHAPES, 2), random_whole(SHAPES, seed=step), step)
    return run_dir


def test_what_is_altered_is_passed_over(two_checkpoints: Path, tmp_path: Path) -> None:
    random = Random(seed())
    for number in range(PLACES):
        run_dir = tmp_path / str(number)
        shutil.copytree(two_checkpoints, run_dir)
        folder = step_folder(run_dir, NEWEST)
        done = alter(folder, random)
        reader, passed_over = CheckpointManager(run_dir).load(load_all)
        assert reader is not None, done
        assert reader.folder == step_folder(run_dir, OLDER), done
        assert len(passed_over) == 1, done
        assert passed_over[0].startswith(str(folder)), done
        shutil.rmtree(run_dir)


def test_where_all_are_altered_none_is_loaded(two_checkpoints: Path, tmp_path: Path) -> None:
    random = Random(seed())
    for number in range(PLACES):
        run_dir = tmp_path / str(number)
        shutil.copytree(two_checkpoints, run_dir)
        for step in (OLDER, NEWEST):
            alter(step_folder(run_dir, step), random)
        for _ in ("first start", "next start"):
            with pytest.raises(GaveUp, match="none of its checkpoints is whole"):
                CheckpointManager(run_dir).load(load_all)


@pytest.mark.long
@pytest.mark.parametrize("number", range(5))
def test_the_run_goes_on_from_the_one_before(number: int, reference: Reference, tmp_path: Path) -> None:
    random = Random(seed())
    run_dir = tmp_path / f"run_{number}"
    reference.copy(run_dir, steps=(8, 9, 10))
    alter(step_folder(run_dir, 10), random)
    alter(step_folder(run_dir, 9), random)
    with start(reference.data, run_dir, "saving.keep_last=0") as command:
        finished = command.wait()
    assert finished.code == 0, finished
    resumed = next(event for event in read(run_dir / "events.jsonl") if event["event"] == "resume")
    assert resumed["step"] == 8
    notes = cast(list[str], resumed["notes"])
    for step, note in zip((10, 9), notes, strict=True):
        assert note.startswith(str(step_folder(run_dir, step)))
    assert [line.partition("passed over: ")[2] for line in finished.stderr.splitlines()] == notes
    assert reference.check(run_dir) == STEPS


@pytest.mark.long
def test_a_run_without_a_whole_checkpoint_never_starts_afresh(reference: Reference, tmp_path: Path) -> None:
    random = Random(seed())
    run_dir = tmp_path / "run"
    reference.copy(run_dir, steps=(9, 10))
    for step in (9, 10):
        alter(step_folder(run_dir, step), random)
    before = (run_dir / "metrics.jsonl").read_bytes()
    for _ in ("first start", "next start"):
        with start(reference.data, run_dir) as command:
            finished = command.wait()
        assert (finished.code, finished.stderr.count("\n")) == (GAVE_UP, 1), finished
        assert finished.stderr.startswith(f"megatrain train: {run_dir}: none of its checkpoints is whole: "), finished
    assert (run_dir / "metrics.jsonl").read_bytes() == before
