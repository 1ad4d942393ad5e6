"""The trainer says where it is while it evaluates, saves and goes back, where no step tells; and what it keeps then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatrain.checkpoint.background import BackgroundSaver
from megatrain.checkpoint.manager import NotSaved
from megatrain.config import SavingConfig, TrainConfig
from megatrain.engines.ranges import MASTER, Shard
from megatrain.errors import GaveUp
from megatrain.observe.metrics import LAG, MetricStream
from megatrain.resilience.anomalies import Anomalies, Series
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
        self.full = False

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
        if self.full:
            raise NotSaved("no space")

    def upload(self, _step: int) -> None:
        """There is nowhere to."""

    def remove_obsolete(self, _config: object) -> list[int]:
        return []

    def load(self, load: Any, before: int, on_read: Any) -> Any:
        """The checkpoint of a step."""
        assert before == 3
        load(None)
        on_read()
        data = {"n": 16, "segments": [{"passed_over": None}]}
        return SimpleNamespace(state={"step": 2, "data": data, "held_out_loss": 1.5}), []

    def load_shards(self, _reader: object) -> None:
        self.places.append(self.trainer.progress.place)

    def remove_after(self, step: int) -> None:
        assert step == 2

    def go_back(self, data: Any, step: int, until: int, reason: str) -> Any:
        """The loader's."""
        assert (step, until, reason) == (2, 31, "2 steps skipped from 3 to 4: loss nan")
        segments = [*data["segments"], {"passed_over": [16, until]}]
        return SimpleNamespace(state=lambda: {"n": until + 1, "segments": segments})

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
        saver=BackgroundSaver(parts, SavingConfig(retries=0), progress, Progress()),
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


def test_going_back_keeps_what_is_known_of_the_checkpoint_and_saves_it_again() -> None:
    trainer = make_trainer(parts := Parts())
    trainer.loader, trainer.open_metrics = parts, lambda _step: MetricStream([])  # type: ignore[assignment]
    trainer.go_back(Series((3, 4), 31, "loss nan"))
    trainer.saver.wait()
    assert (trainer.step, trainer.undone, trainer.anomalies.rollbacks) == (2, STEP - 2, 1)
    assert trainer.loader.state()["n"] == 32
    assert trainer._state().get("held_out_loss") == 1.5
    assert parts.places == [Place(STEP, "go_back"), *[Place(2, "save")] * 2]


def test_a_stop_after_going_back_needs_the_checkpoint_that_knows_of_it() -> None:
    """That from before would have the next start train on the same samples again."""
    trainer = make_trainer(parts := Parts())
    trainer.loader, trainer.open_metrics = parts, lambda _step: MetricStream([])  # type: ignore[assignment]
    parts.full = True
    trainer.go_back(Series((3, 4), 31, "loss nan"))
    with pytest.raises(GaveUp, match="no space"):
        trainer.save_last()
    parts.full = False
    trainer.save_last()
    assert trainer.saved_step == 2


def test_a_stop_comes_as_soon_where_the_run_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks agree on a number of steps from now; going back doesn't put it off."""
    trainer, polled = make_trainer(Parts()), []
    trainer.step, trainer.loader = 0, iter([SimpleNamespace(begun=(), bad_members=())] * 9)  # type: ignore[assignment]
    trainer.anomalies = SimpleNamespace(series=lambda step: step == 4 and not trainer.undone)  # type: ignore[assignment]

    def step(_batch: object, _began: float) -> None:
        trainer.step += 1

    def go_back(_series: object) -> None:
        trainer.step, trainer.undone = 2, 2

    def poll(steps: int) -> str | None:
        polled.append((trainer.step, steps))
        return "asked" if steps == 6 else None

    trainer.stopping = SimpleNamespace(poll=poll)  # type: ignore[assignment]
    for name, stand_in in {"train_step": step, "go_back": go_back, "save_last": lambda: None}.items():
        monkeypatch.setattr(trainer, name, stand_in)
    assert trainer.run() == "asked"
    assert polled == [(1, 1), (2, 2), (3, 3), (2, 4), (3, 5), (4, 6)]
