"""The trainer says where it is while it evaluates and saves, where no step tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megatrain.checkpoint.background import BackgroundSaver
from megatrain.config import SavingConfig, TrainConfig
from megatrain.engines.ranges import MASTER, Shard
from megatrain.observe.metrics import LAG, MetricStream
from megatrain.resilience.anomalies import Anomalies
from megatrain.resilience.progress import Place, Progress
from megatrain.resilience_config import AnomaliesConfig
from megatrain.trainer import Trainer
from tests import samples

STEP = 6


class Parts:
    """An engine and a checkpoint manager that take what they are given and note where the trainer was then."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.trainer: Any = None

    def evaluate(self, micro_batches: Iterable[object]) -> Any:
        self.take(micro_batches)
        return SimpleNamespace(loss=lambda: torch.tensor(1.0))

    def shards(self) -> Iterator[Shard]:
        for name in ("embedding", "head"):
            self.places.append(self.trainer.progress.place)
            yield Shard(name, (2,), ((0, 2),), {MASTER: torch.zeros(2)})

    def differing_weights(self) -> None:
        return None

    def optimizer_step(self) -> int:
        return STEP

    def save(self, _step: int, shards: Iterable[Shard], _state: object) -> None:
        assert len(list(shards)) == 2

    def upload(self, _step: int) -> None:
        """There is nowhere to."""

    def remove_obsolete(self, _config: object) -> list[int]:
        return []

    def take(self, items: Iterable[object]) -> None:
        self.places += [self.trainer.progress.place for _ in items]


def make_trainer(parts: Any) -> Trainer:
    absent: Any = None
    progress = Progress()
    parts.trainer = Trainer(
        config=TrainConfig(run_dir="run", max_steps=STEP),
        device=torch.device("cpu"),
        mesh=absent,
        engine=parts,
        loader=SimpleNamespace(state=lambda: {"n": 0}),  # type: ignore[arg-type]
        metrics=MetricStream([]),
        saver=BackgroundSaver(parts, SavingConfig(), progress, Progress()),
        stopping=absent,
        events=None,
        held_out=lambda: iter([samples.batch(samples=1, sequence_length=4, seed=seed) for seed in range(3)]),
        kept_state={"config": {}, "tokenizer": {}, "wandb_run_id": ""},
        anomalies=Anomalies(AnomaliesConfig(), LAG),
        open_metrics=absent,
        step=STEP,
        progress=progress,
    )
    trainer: Trainer = parts.trainer
    return trainer


def test_each_micro_batch_of_an_evaluation_is_a_part() -> None:
    parts = Parts()
    make_trainer(parts).evaluate()
    assert parts.places == [Place(STEP, "evaluate", part) for part in (1, 2, 3)]


def test_each_shard_of_a_save_is_progress_at_the_same_place() -> None:
    parts = Parts()
    make_trainer(parts).save()
    assert parts.places == [Place(STEP, "save")] * 2
    assert parts.places[0] is not parts.places[1]


def test_a_save_still_running_at_the_end_is_the_last_one() -> None:
    trainer = make_trainer(Parts())
    trainer.save()
    trainer.save_last()
    assert trainer.saved_step == STEP
    assert trainer.saver.collect() is None
