"""Saves a checkpoint in forked children that are killed before one call after the other; run by test_manager.py.

python -m tests.checkpoint.dying RUN_DIR: prints how many children died, and how many of them had committed.
Each child is killed (SIGKILL) before its n-th call that changes the disk, until one lives. After each death what is
newest must be whole and be one of the two saved states. A process of its own, so that forking it is safe.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megatrain.checkpoint.folders import newest, step_folder
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.engines.ranges import MASTER, Shard
from tests.checkpoint.layouts import trainer_state

CALLS = {"open", "write", "flush", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"}
SIZE = 600_000


def save(run_dir: Path, step: int, value: float) -> None:
    shard = Shard("w", (SIZE,), ((0, SIZE),), {MASTER: torch.full((SIZE,), value)})
    CheckpointManager(run_dir).save(step, [shard], trainer_state(step))


def die_before(number: int) -> None:
    """Kills this process before its `number`-th call of CALLS from now on."""
    left = number

    def look(_frame: FrameType, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_call" and function.__name__ in CALLS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)


def main(run_dir: Path, step: int) -> None:
    """Step 1 holds 1.0; the children save `step` with 2.0."""
    died = committed = 0
    while True:
        shutil.rmtree(run_dir, ignore_errors=True)
        save(run_dir, 1, 1.0)
        child = os.fork()
        if child == 0:
            die_before(died)
            save(run_dir, step, 2.0)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        died += 1
        CheckpointManager(run_dir).clean()
        found, passed_over = newest(run_dir)
        assert found is not None, died
        assert not passed_over, passed_over
        reader = CheckpointReader(found)
        reader.verify_all()
        value = reader.read(MASTER, "w", 0, SIZE)
        assert value[0].item() in (1.0, 2.0)
        assert torch.equal(value, value[0].expand(SIZE))
        committed += value[0].item() == 2.0
        assert [path.name for path in found.parent.iterdir() if path != found] in ([], [step_folder(run_dir, 1).name])
    assert CheckpointReader(step_folder(run_dir, step)).read(MASTER, "w", 0, 1).item() == 2.0
    print(died, committed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
