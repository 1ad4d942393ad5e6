"""Runs of the real command that are killed, and what must hold after each death.

Design choices:
- Deaths come one after the other in the same run directory: each start is the restart after the death before it, so a
  death costs one start and not two, and what the restarts make of each other's leftovers is seen too.
- A run that nothing interrupted keeps a checkpoint of every step. After each death every record and every checkpoint
  that reads as whole is compared with it, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.folders import checkpoints_folder, scan, step_folder
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.errors import BUG
from megatrain.observe.records import Value, read
from tests.chaos.injection.sitecustomize import VARIABLE
from tests.distributed.command import Command, curve, keys

INJECTION = Path(__file__).parent / "injection"
STEPS = 24
KEPT = 2
SAVING = ("saving.every=1", f"saving.keep_last={KEPT}")
OVERRIDES = ("model.vocab_size=8192", f"max_steps={STEPS}", *SAVING, "resilience.crash_loop=0")
"""A checkpoint of 7 MB after every step: the data file of a rank takes several writes. Deaths at one step are meant."""


@dataclass(frozen=True)
class Point:
    """A moment inside a save: before or after a call of a rank that changes the disk. everyone: all die, not it alone.

    moment: as tests/chaos/injection names it.
    """

    rank: int
    moment: str
    everyone: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} {self.moment}{', all' if self.everyone else ''}"


def injected(run_dir: Path, **options: Any) -> dict[str, str]:
    """The environment of a command whose ranks act as tests/chaos/injection says."""
    path = [str(INJECTION), *filter(None, [os.environ.get("PYTHONPATH")])]
    injection = {"folder": str(checkpoints_folder(run_dir)), **options}
    return {"PYTHONPATH": os.pathsep.join(path), VARIABLE: json.dumps(injection)}


def start(data: Path, run_dir: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> Command:
    """The command with OVERRIDES, on two processes. Output goes beside the data: run_dir's disk may be full."""
    arguments = keys(data, run_dir, "launch.processes=2", *OVERRIDES, *overrides)
    return Command(["-m", "megatrain", "train", *arguments], data.parent, environment or {})


def starts(run_dir: Path) -> list[Value]:
    """The step that each start began from, of those that came as far as training."""
    return [event["step"] for event in read(run_dir / "events.jsonl") if event["event"] in ("start", "resume")]


@dataclass(frozen=True)
class Reference:
    """A run that nothing interrupted, with all its checkpoints. data: what it was trained on."""

    data: Path
    run_dir: Path

    def copy(self, run_dir: Path, steps: Sequence[int]) -> None:
        """Makes a run directory as after a death, with the checkpoints of these steps."""
        for step in steps:
            shutil.copytree(step_folder(self.run_dir, step), step_folder(run_dir, step))
        shutil.copy(self.run_dir / "metrics.jsonl", run_dir)

    def check(self, run_dir: Path) -> int:
        """What holds of a run at any moment; the step of its newest whole checkpoint, 0 where it has none.

        Its records so far, and every checkpoint that reads as whole, are the reference's, bit for bit.
        """
        records = curve(run_dir)
        assert records == curve(self.run_dir)[: len(records)]
        steps = [found.step for found in scan(run_dir) if found.problem is None]
        for step in steps:
            assert_same(step_folder(run_dir, step), step_folder(self.run_dir, step))
        return max(steps, default=0)

    def finish(self, run_dir: Path) -> None:
        """Starts a run again, from its newest whole checkpoint, and lets it go to its end, which is the reference's."""
        newest = self.check(run_dir)
        with start(self.data, run_dir) as command:
            command.succeed()
        assert starts(run_dir)[-1] == newest
        assert self.check(run_dir) == STEPS
        assert len(curve(run_dir)) == STEPS


@dataclass
class Dying:
    """A run that dies again and again. Where it comes near its end it gets there, and the next begins."""

    reference: Reference
    folder: Path
    runs: int = 1
    step: int = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / f"run_{self.runs}"

    def die(self, point: Point) -> None:
        """Starts it, waits for its death at `point`, and checks what is left."""
        if self.step > STEPS - 2 * KEPT:
            self.finish()
        before = len(starts(self.run_dir))
        action = "kill all" if point.everyone else "kill"
        environment = injected(self.run_dir, rank=point.rank, point=point.moment, action=action)
        with start(self.reference.data, self.run_dir, environment=environment) as command:
            finished = command.wait()
            assert command.left_over() == []
        killed = f"megatrain train: rank {point.rank} ({socket.gethostname()}) was killed by signal 9\n"
        said = [line for line in finished.stderr.splitlines(keepends=True) if not line.startswith("passed over: ")]
        expected = (-signal.SIGKILL, "") if point.everyone else (BUG, killed)
        assert (finished.code, "".join(said)) == expected, f"{point}: {finished.stdout}"
        assert starts(self.run_dir)[before:] in ([], [self.step]), f"{point}: not from the newest whole checkpoint"
        before_it, self.step = self.step, self.reference.check(self.run_dir)
        assert self.step >= before_it, f"{point}: lost a checkpoint"

    def finish(self) -> None:
        """It lives from here to its end."""
        self.reference.finish(self.run_dir)
        self.runs, self.step = self.runs + 1, 0


def assert_same(folder: Path, expected: Path) -> None:
    """Two checkpoints are whole, every byte verified, and hold the same state."""
    ours, theirs = CheckpointReader(folder), CheckpointReader(expected)
    ours.verify_all()
    for key in ("step", "optimizer_step", "samples", "data"):
        assert ours.state[key] == theirs.state[key], f"{folder}: {key}"
    assert ours.index.keys() == theirs.index.keys()
    for (state, name), ranges in theirs.index.items():
        a, b = (each.read(state, name, 0, ranges.size).view(torch.uint8) for each in (ours, theirs))
        assert torch.equal(a, b), f"{folder}: {state} of {name}"
