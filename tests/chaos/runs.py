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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.folders import checkpoints_folder, scan, step_folder
from megatrain.checkpoint.reader import CheckpointReader
from tests.chaos.injection.sitecustomize import VARIABLE
from tests.distributed.command import Command, curve, train

INJECTION = Path(__file__).parent / "injection"
STEPS = 24
OVERRIDES = ("model.vocab_size=8192", "saving.every=1", f"max_steps={STEPS}")
"""A checkpoint of 14 MB after every step: the files of a rank take several writes."""


@dataclass(frozen=True)
class Point:
    """A moment of a rank's save: before or after a call that changes the disk; who dies at it."""

    rank: int
    moment: str
    everyone: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} {self.moment}{', all die' if self.everyone else ''}"


def injected(run_dir: Path, **options: Any) -> dict[str, str]:
    """The environment of a command whose ranks act as tests/chaos/injection says."""
    path = [str(INJECTION), *filter(None, [os.environ.get("PYTHONPATH")])]
    injection = {"folder": str(checkpoints_folder(run_dir)), **options}
    return {"PYTHONPATH": os.pathsep.join(path), VARIABLE: json.dumps(injection)}


def start(data: Path, run_dir: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> Command:
    """The command with OVERRIDES, on two processes."""
    return train(data, run_dir, *OVERRIDES, *overrides, **(environment or {}))


@dataclass(frozen=True)
class Reference:
    """A run that nothing interrupted, with all its checkpoints."""

    run_dir: Path
    last_step: int = STEPS

    def check(self, run_dir: Path) -> int:
        """What holds of a run at any moment; returns the step of its newest whole checkpoint, 0 where it has none.

        Its records so far, and every checkpoint that reads as whole, are the reference's, bit for bit.
        """
        records = curve(run_dir)
        assert records == curve(self.run_dir)[: len(records)]
        steps = [found.step for found in scan(run_dir) if found.problem is None]
        for step in steps:
            assert_same(step_folder(run_dir, step), step_folder(self.run_dir, step))
        return max(steps, default=0)


def assert_same(folder: Path, expected: Path) -> None:
    """Two checkpoints are whole, every byte verified, and hold the same state."""
    ours, theirs = CheckpointReader(folder), CheckpointReader(expected)
    ours.verify_all()
    for key in ("step", "optimizer_step", "samples", "data"):
        assert ours.state[key] == theirs.state[key], f"{folder}: {key}"
    assert ours.rows.keys() == theirs.rows.keys()
    for state, name in ours.rows:
        ours_, theirs_ = (each.read(state, name, 0, each.rows[state, name][-1].stop) for each in (ours, theirs))
        assert torch.equal(ours_.view(torch.uint8), theirs_.view(torch.uint8)), f"{folder}: {state} of {name}"
