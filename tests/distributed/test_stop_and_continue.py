"""Law 7 through the real command: stopped or killed at a random step, started again, it trains the same."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from megatrain.checkpoint.folders import newest, read_state
from megatrain.errors import DONE, STOPPED
from megatrain.observe.records import read
from megatrain.resilience.outcome import Outcome, read_outcome, write_outcome
from tests.distributed.command import STEPS, Command, curve, keys, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

Uninterrupted = Callable[..., Path]


def random_step(first: int, last: int) -> int:
    """Another one in every run of the tests; printed, which shows where the test fails."""
    step = Random(os.urandom(8)).randint(first, last)
    print(f"at step {step}")
    return step


def newest_step(run_dir: Path) -> int:
    """The step of the newest whole checkpoint."""
    folder, _ = newest(run_dir)
    assert folder is not None
    return read_state(folder)["step"]


def outcome_of(run_dir: Path) -> Outcome:
    outcome = read_outcome(run_dir)
    assert outcome is not None
    return outcome


def stop(command: Command, run_dir: Path, step: int, *numbers: signal.Signals) -> int:
    """Sends signals to the launcher once `step` is written down; checks how the run ends; the step it stopped at."""
    command.wait_until(run_dir / "metrics.jsonl", lines=step)
    for number in numbers:
        command.process.send_signal(number)
    finished = command.wait()
    assert (finished.code, finished.stderr) == (STOPPED, "")
    assert all(line.startswith("step ") for line in finished.stdout.splitlines()), finished.stdout
    assert command.left_over() == []
    outcome = outcome_of(run_dir)
    assert outcome.exit_code == STOPPED
    assert outcome.reason in (f"{numbers[0].name} at rank 0", f"{numbers[0].name} at rank 1")
    assert outcome.step == newest_step(run_dir) == curve(run_dir)[-1][0]
    assert step < outcome.step < STEPS
    return outcome.step


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [
        pytest.param(
            ("precision=fp32", "engine.zero_stage=3"), [signal.SIGTERM], marks=pytest.mark.long, id="zero3-fp32"
        ),
        pytest.param(
            ("precision=bf16", "engine.zero_stage=3"), [signal.SIGTERM], marks=pytest.mark.long, id="zero3-bf16"
        ),
        pytest.param(
            ("precision=bf16", "engine.zero_stage=1"), [signal.SIGUSR1, signal.SIGUSR1], id="zero1-bf16-twice"
        ),
        pytest.param(("precision=bf16", "engine=fsdp"), [signal.SIGTERM], id="fsdp-bf16"),
    ],
)
def test_a_run_that_was_stopped_trains_the_same(
    overrides: tuple[str, ...],
    numbers: list[signal.Signals],
    small_set: Path,
    uninterrupted: Uninterrupted,
    tmp_path: Path,
) -> None:
    expected = curve(uninterrupted(*overrides))
    assert [step for step, *_ in expected] == list(range(1, STEPS + 1))
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, *overrides) as command:
        stopped_at = stop(command, run_dir, random_step(1, 12), *numbers)
    assert curve(run_dir) == expected[:stopped_at]
    with train(small_set, run_dir, *overrides) as command:
        command.succeed()
    assert curve(run_dir) == expected
    events = [(event["event"], event["step"]) for event in read(run_dir / "events.jsonl")]
    assert events == [
        ("start", 0),
        ("save", stopped_at),
        ("signal", stopped_at),
        ("stop", stopped_at),
        ("resume", stopped_at),
        ("save", STEPS),
        ("stop", STEPS),
    ]


def test_a_run_that_was_killed_continues_from_its_last_checkpoint_also_under_torchrun(
    small_set: Path, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    overrides = ("precision=fp32", "engine.zero_stage=3")
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, *overrides, "saving.every=3") as command:
        command.wait_until(run_dir / "metrics.jsonl", lines=random_step(4, 14))
        command.kill()
    assert read_outcome(run_dir) is None
    saved_step = newest_step(run_dir)
    assert saved_step % 3 == 0
    written = curve(run_dir)[-1][0]
    # As if an earlier start had been stopped: torchrun has nobody who clears that.
    write_outcome(run_dir, STOPPED, "an earlier start", None, rank=0)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatrain.train"]
    with Command([*torchrun, *keys(small_set, run_dir, *overrides)], tmp_path) as command:
        command.succeed()
    assert curve(run_dir) == curve(uninterrupted(*overrides)), f"killed at {written}, continued from {saved_step}"
    assert [(e["event"], e["step"]) for e in read(run_dir / "events.jsonl")][-3:] == [
        ("resume", saved_step),
        ("save", STEPS),
        ("stop", STEPS),
    ]
    outcome = outcome_of(run_dir)
    assert (outcome.exit_code, outcome.reason, outcome.step) == (DONE, f"step {STEPS} of {STEPS}", STEPS)


def test_another_number_of_processes_trains_on_the_same_samples(
    small_set: Path, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    overrides = ("precision=fp32", "engine.zero_stage=3")
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, *overrides, processes=1) as command:
        stop(command, run_dir, random_step(1, 5), signal.SIGTERM)
    with train(small_set, run_dir, *overrides, processes=2) as command:
        stop(command, run_dir, random_step(11, 15), signal.SIGINT)
    with train(small_set, run_dir, *overrides, processes=1) as command:
        command.succeed()
    sizes = [e["world_size"] for e in read(run_dir / "events.jsonl") if e["event"] in ("start", "resume")]
    assert sizes == [1, 2, 1]
    ours, expected = curve(run_dir), curve(uninterrupted(*overrides))
    assert [(step, digest) for step, _, _, digest in ours] == [(step, digest) for step, _, _, digest in expected]
    for (step, *numbers, _), (_, *wanted, _) in zip(ours, expected, strict=True):
        assert numbers == pytest.approx(wanted, rel=1e-5), f"loss and gradient norm of step {step}"


@pytest.mark.parametrize("ranks", [0, 2], ids=["before there are ranks", "while the ranks start"])
def test_a_request_before_training_is_heard(ranks: int, small_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with train(small_set, run_dir) as command:
        command.wait_for(lambda: run_dir.exists() and len(command.ranks()) == ranks, "the moment to stop it")
        command.process.send_signal(signal.SIGTERM)
        finished = command.wait()
        assert (finished.code, finished.stderr) == (STOPPED, "")
        assert command.left_over() == []
    outcome = outcome_of(run_dir)
    assert outcome.exit_code == STOPPED
    if ranks:
        assert outcome.step == newest_step(run_dir) < STEPS
    elif outcome.step is None:
        assert outcome.reason == "SIGTERM before the first step"


def test_a_finished_run_is_done_at_once(uninterrupted: Uninterrupted, small_set: Path, tmp_path: Path) -> None:
    overrides = ("precision=fp32", "engine.zero_stage=3")
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted(*overrides), run_dir)
    before = curve(run_dir)
    with train(small_set, run_dir, *overrides) as command:
        command.succeed()
    assert curve(run_dir) == before
    assert newest_step(run_dir) == STEPS
    assert [event["event"] for event in read(run_dir / "events.jsonl")] == ["start", "save", "stop", "resume", "stop"]
