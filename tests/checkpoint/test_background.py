"""Saves while training goes on: what is written is what was there, and no failure but a bug gets out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.background import BackgroundSaver, Save
from megatrain.checkpoint.folders import scan, step_folder
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.snapshot import CUT_BYTES, Snapshot
from megatrain.config import SavingConfig, WhenBusy
from megatrain.engines.ranges import MASTER, Shard
from megatrain.resilience.progress import Progress
from tests.checkpoint.layouts import even_layout, on_threads, random_whole, trainer_state

CONFIG = SavingConfig(retries=1, retry_seconds=0.01)
SIZE = 1000


class Weights:
    """A parameter that can be changed, and a disk that can be slow or broken."""

    def __init__(self) -> None:
        self.values = torch.zeros(SIZE)
        self.may_write = threading.Event()
        self.may_write.set()
        self.errors: list[Exception] = []

    def shards(self) -> Iterator[Shard]:
        yield Shard("w", (SIZE,), ((0, SIZE),), {MASTER: self.values})


class SlowManager(CheckpointManager):
    """Waits, and fails, where the weights say so."""

    weights: Weights

    def save(self, step: int, shards: Iterable[Shard], state: TrainerState) -> Path:
        self.weights.may_write.wait(10)
        return super().save(step, self._failing(shards), state)

    def _failing(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        if self.weights.errors:
            raise self.weights.errors.pop(0)
        yield from shards


def make(run_dir: Path, config: SavingConfig = CONFIG) -> tuple[BackgroundSaver, Weights]:
    weights, background = Weights(), Progress()
    manager = SlowManager(run_dir)
    manager.weights = weights
    return BackgroundSaver(manager, config, Progress(), background), weights


def save(saver: BackgroundSaver, weights: Weights, step: int) -> Save:
    assert saver.ready()
    saver.begin(step, weights.shards, trainer_state(step))
    return result_of(saver)


def result_of(saver: BackgroundSaver) -> Save:
    saver.wait()
    result = saver.collect()
    assert result is not None
    return result


def saved_value(run_dir: Path, step: int) -> float:
    reader = CheckpointReader(step_folder(run_dir, step))
    reader.verify_all()
    values = reader.read(MASTER, "w", 0, SIZE)
    assert torch.equal(values, values[:1].expand(SIZE))
    return values[0].item()


def test_training_may_change_the_weights_while_they_are_written(tmp_path: Path) -> None:
    saver, weights = make(tmp_path)
    for step in (1, 2):
        weights.values.fill_(step)
        weights.may_write.clear()
        saver.begin(step, weights.shards, trainer_state(step))
        weights.values.fill_(99.0)
        assert saver.collect() is None
        weights.may_write.set()
        assert (result := result_of(saver)).failure is None
        assert (result.step, result.attempts) == (step, 1)
    assert [saved_value(tmp_path, step) for step in (1, 2)] == [1.0, 2.0]


def test_without_a_copy_a_save_is_over_when_begin_returns(tmp_path: Path) -> None:
    saver, weights = make(tmp_path, replace(CONFIG, asynchronous=False))
    weights.errors = [OSError(5, "broken")]
    saver.begin(1, weights.shards, trainer_state(1))
    weights.values.fill_(99.0)
    result = saver.collect()
    assert result is not None
    assert (result.failure, result.attempts) == (None, 2)
    assert saved_value(tmp_path, 1) == 0.0


def test_a_save_that_fails_is_tried_again_then_reported_and_the_next_one_works(tmp_path: Path) -> None:
    saver, weights = make(tmp_path)
    weights.errors = [OSError(28, "full")]
    assert save(saver, weights, 1).attempts == 2
    weights.errors = [OSError(28, "full")] * 2
    failed = save(saver, weights, 2)
    assert failed.failure == f"{step_folder(tmp_path, 2)}: not saved: rank 0: [Errno 28] full"
    assert failed.attempts == 2
    assert save(saver, weights, 3).failure is None
    assert [found.step for found in scan(tmp_path)] == [3, 1]


def test_a_bug_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    saver, weights = make(tmp_path)
    weights.errors = [KeyError("w")]
    saver.begin(1, weights.shards, trainer_state(1))
    saver.wait()
    with pytest.raises(KeyError, match="w"):
        saver.collect()
    assert scan(tmp_path) == []


def test_a_save_that_is_due_while_another_runs_waits(tmp_path: Path) -> None:
    saver, weights = make(tmp_path)
    weights.may_write.clear()
    saver.begin(1, weights.shards, trainer_state(1))
    threading.Timer(0.3, weights.may_write.set).start()
    assert saver.ready()
    assert (result := saver.collect()) is not None
    assert result.step == 1


def test_or_is_skipped_on_all_ranks_where_it_runs_on_one(tmp_path: Path) -> None:
    slow = threading.Event()

    def rank_main(rank: int, agree: Callable[[str | None], str | None]) -> list[bool]:
        config = replace(CONFIG, when_busy=WhenBusy.skip)
        saver = BackgroundSaver(CheckpointManager(tmp_path / str(rank)), config, Progress(), Progress(), agree)
        weights = Weights()
        if rank == 1:
            weights.shards = lambda: iter(())  # type: ignore[method-assign]
            saver.manager.save = lambda *_: slow.wait(10)  # type: ignore[assignment, method-assign]
        free = [saver.ready()]
        saver.begin(1, weights.shards, trainer_state(1))
        if rank == 0:
            saver.wait()
        free.append(saver.ready())
        slow.set()
        saver.wait()
        return [*free, saver.ready()]

    assert on_threads(2, rank_main) == [[True, False, True]] * 2


def test_old_checkpoints_go_when_a_new_one_is_committed(tmp_path: Path) -> None:
    saver, weights = make(tmp_path, replace(CONFIG, keep_last=2, keep_every=4))
    removed = [save(saver, weights, step).removed for step in range(1, 8)]
    assert removed == [[], [], [1], [2], [3], [], [5]]
    assert [found.step for found in scan(tmp_path)] == [7, 6, 4]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_the_best_stay(tmp_path: Path) -> None:
    saver, weights = make(tmp_path, replace(CONFIG, keep_last=1, keep_best=2))
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 2.5, None], start=1):
        state = trainer_state(step)
        if loss is not None:
            state["held_out_loss"] = loss
        saver.begin(step, weights.shards, state)
        assert result_of(saver).failure is None
    assert [found.step for found in scan(tmp_path)] == [6, 4, 2]


def test_a_copy_is_what_this_rank_writes_in_memory_that_is_used_again() -> None:
    large = 3 * CUT_BYTES // 4 + 5
    shapes: dict[str, tuple[int, ...]] = {"large": (large,), "small": (7,)}
    whole = random_whole(shapes)
    snapshot, addresses = Snapshot(), []
    for _ in range(2):
        snapshot.take(even_layout(shapes, 2).shards(1, whole))
        copy = snapshot.shards()
        assert [(shard.name, shard.replicas) for shard in copy] == [("large", 1), ("large", 1), ("small", 1)]
        assert [shard.ranges for shard in copy][-1] == ((3, 7),)
        for shard in copy:
            ((start, stop),) = shard.ranges
            for state, tensor in shard.tensors.items():
                assert torch.equal(tensor.view(torch.uint8), whole[shard.name][state][start:stop].view(torch.uint8))
        addresses.append([tensor.data_ptr() for shard in copy for tensor in shard.tensors.values()])
    assert addresses[0] == addresses[1]


def test_replicas_copy_their_part_each() -> None:
    snapshot = Snapshot()
    snapshot.take([Shard("w", (10,), ((2, 5), (6, 10)), {MASTER: torch.arange(7.0)}, replica=1, replicas=2)])
    assert [(s.ranges, s.tensors[MASTER].tolist()) for s in snapshot.shards()] == [
        (((3, 5),), [1.0, 2.0]),
        (((8, 10),), [5.0, 6.0]),
    ]
