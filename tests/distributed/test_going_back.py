"""Steps that go wrong again: the run goes back to a checkpoint in mid-run and passes over the samples since.

Then it is, to the bit, what a run is that goes on from that checkpoint and is told to pass the same samples over: in
every kind of layout, while a checkpoint is being written, and where it is asked to stop at the same time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import read_state, scan, step_folder
from megatrain.errors import STOPPED
from megatrain.resilience.outcome import read_outcome
from tests.distributed.command import STEPS, curve
from tests.distributed.test_anomalies import ANOMALIES, FP32, NAN, events, injecting, run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SAVING = ("saving.every=4", "saving.keep_last=0", "resilience.corruption_every=2")
"""Comparisons see the steps that go wrong, and those after going back."""
BF16 = ("precision=bf16",)
TENSOR, PIPELINE = (*BF16, "parallel.tensor=2"), (*BF16, "parallel.pipeline=2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "zero0 dp2": (2, ("precision=fp32", "engine.zero_stage=0")),
    "zero1 dp2": (2, (*BF16, "engine.zero_stage=1")),
    "zero2 dp2": (2, (*BF16, "engine.zero_stage=2")),
    "zero3 dp2": (2, BF16),
    "zero3-offload dp2": (2, (*BF16, "engine.offload_optimizer=true")),
    "fsdp-full dp2": (2, (*BF16, "engine=fsdp")),
    "fsdp-gradient dp2": (2, (*BF16, "engine=fsdp", "engine.shard=gradient")),
    "fsdp-full replicate2": (4, (*BF16, "engine=fsdp", "parallel.replicate=2")),
    "zero1 tp2 dp2": (4, (*TENSOR, "engine.zero_stage=1")),
    "zero3 tp2 dp2": (4, TENSOR),
    "fsdp-full tp2 dp2": (4, (*TENSOR, "engine=fsdp")),
    "zero0 pp2 dp2": (4, ("precision=fp32", "parallel.pipeline=2", "engine.zero_stage=0")),
    "zero1 pp2 dp2": (4, (*PIPELINE, "engine.zero_stage=1")),
    "zero2 pp2 dp2": (4, (*PIPELINE, "engine.zero_stage=2")),
    "zero3 pp2 dp2": (4, PIPELINE),
    "fsdp-full pp2 dp2": (4, (*PIPELINE, "engine=fsdp")),
    "fsdp-gradient pp2 dp2": (4, (*PIPELINE, "engine=fsdp", "engine.shard=gradient")),
}
"""Ranks, and what is asked for."""


def going_wrong(folder: Path, first: int, last: int, besides: str = "") -> str:
    """The PYTHONPATH of a command whose last rank computes NaN of batches that begin with these samples."""
    when = f"{first} <= batch.first <= {last} and dist.get_rank() == dist.get_world_size() - 1"
    return injecting(folder, when, NAN, besides)


def go_back(small_set: Path, folder: Path, layout: tuple[str, ...], processes: int = 2) -> tuple[Path, str]:
    """Compares a run that goes back with one that is told what to pass over; its directory, and its PYTHONPATH."""
    run_dir, told = folder / "run", folder / "told"
    # Steps 14 and 15.
    path = going_wrong(folder / "injected", 104, 112)
    keys = (*layout, *SAVING)
    with run(small_set, run_dir, *keys, path=path, processes=processes) as command:
        command.succeed(300)
    (rollback,) = events(run_dir, "rollback")
    # Known to all two steps later.
    assert (rollback["step"], rollback["left_step"], rollback["passed_over"]) == (12, 17, [96, 119])
    assert rollback["reason"] == "2 steps skipped from 14 to 15: gradient norm nan"
    assert [event["step"] for event in events(run_dir, "skip")] == [14, 15]
    assert [event["passed_over"] for event in events(run_dir, "segment")] == [[96, 119]]
    assert [found.step for found in scan(run_dir)] == [24, 20, 16, 12, 8, 4]
    state = read_state(step_folder(run_dir, 24))
    assert (state["samples"], state["anomalies"]["rollbacks"]) == (24 * 8 + 24, 1)

    shutil.copytree(step_folder(run_dir, 8), step_folder(told, 8))
    with run(small_set, told, *keys, "data.pass_over=[[96,119]]", processes=processes) as command:
        command.succeed(300)
    assert curve(told) == curve(run_dir)[8:]
    return run_dir, path


def test_data_that_go_wrong_again_are_passed_over(small_set: Path, tmp_path: Path) -> None:
    """Who starts from where the run went back to knows of it."""
    run_dir, path = go_back(small_set, tmp_path, FP32)
    resumed = tmp_path / "resumed"
    shutil.copytree(step_folder(run_dir, 12), step_folder(resumed, 12))
    with run(small_set, resumed, *FP32, path=path) as command:
        command.succeed(300)
    assert curve(resumed) == curve(run_dir)[12:]
    assert read_state(step_folder(resumed, 24))["anomalies"]["rollbacks"] == 1


@pytest.mark.long
@pytest.mark.parametrize(("processes", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_goes_back(processes: int, layout: tuple[str, ...], small_set: Path, tmp_path: Path) -> None:
    go_back(small_set, tmp_path, layout, processes)


SLOW_SAVE = """
import time

from megatrain.checkpoint import manager

write_rank, go_back = manager.write_rank, Trainer.go_back


def slow(folder, rank, shards):
    if folder.name == "step_{step:08}":
        time.sleep(3)
    write_rank(folder, rank, shards)


def expecting_it(self, series):
    assert self.saver.background.place.step == {step}
    assert not self.saver._running.done()
    go_back(self, series)


manager.write_rank, Trainer.go_back = slow, expecting_it
"""
"""The checkpoint of a step is still being written when the run goes back; else the run ends."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("saving", "bad", "left", "last"),
    [(16, (14, 15), 17, 119), (12, (13, 14), 16, 111)],
    ids=["of a later step", "of the step that it goes back to"],
)
def test_going_back_while_a_checkpoint_is_being_written(
    saving: int,
    bad: tuple[int, int],
    left: int,
    last: int,
    small_set: Path,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    first, second = ((step - 1) * 8 for step in bad)
    path = going_wrong(tmp_path / "injected", first, second, SLOW_SAVE.format(step=saving))
    with run(small_set, run_dir, *FP32, *SAVING, path=path) as command:
        command.succeed(300)
    (rollback,) = events(run_dir, "rollback")
    assert (rollback["step"], rollback["left_step"], rollback["passed_over"]) == (12, left, [96, last])
    assert [found.step for found in scan(run_dir)] == [24, 20, 16, 12, 8, 4]
    assert curve(run_dir) == curve(uninterrupted(*FP32, *ANOMALIES, f"data.pass_over=[[96,{last}]]"))


ASKED_TO_STOP = """
import os
import signal

from megatrain.resilience.stopping import StopAgreement

poll = StopAgreement.poll


def asked(self, steps):
    if steps == {step} and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return poll(self, steps)


StopAgreement.poll = asked
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("asked_at", "stopped_at"),
    # After three more steps. The run goes back from step 17 to step 12.
    [(13, 16), (14, 12), (15, 13), (16, 14)],
    ids=["stops before", "stops at once", "stops a step later", "stops two steps later"],
)
def test_a_stop_that_is_agreed_when_the_run_goes_back(
    asked_at: int, stopped_at: int, small_set: Path, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """It ends with a checkpoint; the next start goes on behind what is passed over, or goes back by itself."""
    run_dir, keys = tmp_path / "run", (*FP32, *SAVING)
    besides = ASKED_TO_STOP.format(step=asked_at)
    with run(small_set, run_dir, *keys, path=going_wrong(tmp_path / "asked", 104, 112, besides)) as command:
        assert command.wait(300).code == STOPPED
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.reason, outcome.step, curve(run_dir)[-1][0]) == ("SIGTERM at rank 1", stopped_at, stopped_at)
    with run(small_set, run_dir, *keys, path=going_wrong(tmp_path / "injected", 104, 112)) as command:
        command.succeed(300)
    assert len(events(run_dir, "rollback")) == 1
    assert read_state(step_folder(run_dir, STEPS))["anomalies"]["rollbacks"] == 1
    assert curve(run_dir) == curve(uninterrupted(*FP32, *ANOMALIES, "data.pass_over=[[96,119]]"))
