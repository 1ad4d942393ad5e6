"""`megatrain train` with two processes, and steps that go wrong in it: skipped, or the end of the run.

What is passed over is in test_going_back.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.folders import read_state, step_folder
from megatrain.errors import GAVE_UP
from megatrain.observe.records import read
from megatrain.resilience.outcome import read_outcome
from tests.distributed.command import ROOT, Command, curve, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

FP32 = ("precision=fp32", "engine.zero_stage=3")
ANOMALIES = tuple(
    f"resilience.anomalies.{key}" for key in ("window=8", "deviations=20", "repeats=2", "within=6", "rollbacks=2")
)

INJECTED = """
import torch.distributed as dist

from megatrain.trainer import Trainer

train_step = Trainer.train_step


def wrong(self, batch, began):
    accumulate = self.engine.accumulate

    def injected(micro_batches, target_count):
        if {when}:
            target_count = target_count * {factor}
        return accumulate(micro_batches, target_count)

    self.engine.accumulate = injected
    train_step(self, batch, began)
    del self.engine.accumulate


Trainer.train_step = wrong
"""
"""What the loss is divided by goes wrong in some steps, on rank 1 alone or on all: so do the gradients."""
NAN = "float('nan')"
SPIKE = "1e-4"


def injecting(folder: Path, when: str, factor: str, besides: str = "") -> str:
    """The PYTHONPATH of a command in which it happens. when: Python, of the trainer `self` and `batch`.

    besides: what else every process runs as it starts.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(INJECTED.format(when=when, factor=factor) + besides)
    return f"{folder}:{ROOT}"


def run(small_set: Path, run_dir: Path, *overrides: str, path: str = str(ROOT), processes: int = 2) -> Command:
    return train(small_set, run_dir, *ANOMALIES, *overrides, processes=processes, PYTHONPATH=path)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [dict(event) for event in read(run_dir / "events.jsonl") if event["event"] == kind]


@pytest.mark.long
def test_a_nan_on_one_rank_and_a_spike_cost_their_steps_and_nothing_else(small_set: Path, tmp_path: Path) -> None:
    """The run is stopped and continued in between: it knows what to expect as one that wasn't does."""
    curves = []
    when = "(self.step == 4 and self.mesh.data_rank == 1) or self.step == 17"
    path = injecting(tmp_path / "injected", when, f"({NAN} if self.step == 4 else {SPIKE})")
    for name, stops in (("whole", ()), ("in_parts", (15,))):
        for steps in (*stops, 24):
            # The schedule of the whole run.
            shape = ("optim.decay_steps=0", f"max_steps={steps}")
            with run(small_set, tmp_path / name, *FP32, *shape, path=path) as command:
                command.succeed(300)
        curves.append(curve(tmp_path / name))
        skips = [(event["step"], event["reason"].split(" above ")[0]) for event in events(tmp_path / name, "skip")]
        assert skips[0] == (5, "gradient norm nan")
        assert skips[1][0] == 18
        assert skips[1][1].startswith("gradient norm ")
        assert len(skips) == 2
        assert events(tmp_path / name, "rollback") == []
        assert read_state(step_folder(tmp_path / name, 24))["optimizer_step"] == 22
    assert repr(curves[0]) == repr(curves[1])


@pytest.mark.parametrize(
    ("saving", "rollbacks", "reason"),
    [
        pytest.param("saving.every=4", 2, "resilience.anomalies.rollbacks=2 are used up", marks=pytest.mark.long),
        pytest.param("saving.every=0", 0, "there is no checkpoint from before to go back to", marks=pytest.mark.long),
    ],
)
def test_what_stays_wrong_ends_the_run(
    saving: str, rollbacks: int, reason: str, small_set: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    path = injecting(tmp_path / "injected", "self.step >= 9", NAN)
    with run(small_set, run_dir, *FP32, saving, path=path) as command:
        finished = command.wait(300)
        assert command.left_over() == []
    said = f"{run_dir}: 2 steps skipped from 10 to 11: gradient norm nan; {reason}"
    assert (finished.code, finished.stderr) == (GAVE_UP, f"megatrain train: {said}\n")
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason) == (GAVE_UP, said)
    assert len(events(run_dir, "rollback")) == rollbacks
    (event,) = events(run_dir, "give_up")
    assert f"{run_dir}: {event['reason']}" == said


@pytest.mark.long
def test_what_was_expected_of_other_batches_is_forgotten(small_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for shape in (("max_steps=4",), ("max_steps=6", "global_batch_size=4")):
        with train(small_set, run_dir, *FP32, *shape, "optim.decay_steps=0", processes=1) as command:
            command.succeed(300)
    (segment,) = events(run_dir, "segment")
    assert (segment["step"], segment["reason"]) == (4, "global_batch_size changed")
    state = read_state(step_folder(run_dir, 6))["anomalies"]
    assert (state["since"], [step for step, *_ in state["good"]]) == (5, [1, 2, 3, 4, 5, 6])
