"""What goes wrong inside a process of a job: a gradient, the speed of a rank, a read, a clock.

Every Python process of a job runs this file as it starts (sitecustomize); what is to happen is JSON in the environment
(VARIABLE), written by injections.py. It happens in the job's first start: the next one is well.

Design choices:
- When it happened is the modification time of a file: that is the kernel's clock, which nothing here changes.
- A clock is libfaketime's, which has to be there before Python is: the process executes itself anew, with it preloaded.
  Only the time of day jumps; no step of a real clock moves the monotonic one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "MEGATRAIN_TEST_INJECTION"
GLOBAL_BATCH = 8
PRELOAD = "LD_PRELOAD"
ONLY_TIME_OF_DAY = {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
LAUNCHER = -1
"""In place of a rank: the launcher of the first node."""


def gradients(step: int, told: Path, steps: int, factor: float) -> None:
    """What this rank's loss is divided by goes wrong with the samples of some steps; so do its gradients."""
    from megatrain.trainer import Trainer

    train_step = Trainer.train_step

    def wrong(self: Any, batch: Any, began: float) -> None:
        accumulate = self.engine.accumulate

        def injected(micro_batches: Any, target_count: Any) -> Any:
            if (step - 1) * GLOBAL_BATCH <= batch.first < (step - 1 + steps) * GLOBAL_BATCH:
                if not told.exists():
                    told.touch()
                target_count = target_count * factor
            return accumulate(micro_batches, target_count)

        self.engine.accumulate = injected
        train_step(self, batch, began)
        del self.engine.accumulate

    Trainer.train_step = wrong  # type: ignore[method-assign]


def speed(step: int, told: Path, seconds: float) -> None:
    """Its matrix products take longer from a step on."""
    from megatrain.model.modules import ColumnLinear
    from megatrain.trainer import Trainer

    train_step, forward = Trainer.train_step, ColumnLinear.forward

    def watched(self: Any, batch: Any, began: float) -> None:
        if self.step + 1 == step:
            told.touch()
        train_step(self, batch, began)

    def slow(self: Any, x: Any) -> Any:
        if told.exists():
            time.sleep(seconds)
        return forward(self, x)

    Trainer.train_step = watched  # type: ignore[method-assign]
    ColumnLinear.forward = slow  # type: ignore[method-assign]


def read(step: int, told: Path) -> None:
    """It never gets the batch of a step."""
    from megatrain.data import loader

    digest = loader.digest

    def hanging(n: Any, ids: Any) -> int:
        if n.max() >= (step - 1) * GLOBAL_BATCH:
            told.touch()
            time.sleep(1000)
        return digest(n, ids)

    loader.digest = hanging


def clock(told: Path, offset: str, **_: int) -> None:
    """Its time of day is another as soon as somebody replaces `offset`; `told` says by how much it differs."""
    import libfaketime

    if PRELOAD not in os.environ:
        library = next(Path(libfaketime.__file__).parent.rglob("libfaketime.so.1"))
        execute_anew({PRELOAD: str(library), "FAKETIME_TIMESTAMP_FILE": offset, **ONLY_TIME_OF_DAY})
    began = time.time() - time.monotonic()

    def watch() -> None:
        while True:
            replace_text(told, str(round(time.time() - time.monotonic() - began)))
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()


def execute_anew(changes: dict[str, str], without: str | None = None) -> None:
    """This process with another environment."""
    environment = {**os.environ, **changes}
    os.execve(sys.executable, sys.orig_argv, {name: environment[name] for name in environment if name != without})


def replace_text(path: Path, text: str) -> None:
    """Whoever reads sees the old text or the new one."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


KINDS: dict[str, Callable[..., None]] = {each.__name__: each for each in (gradients, speed, read, clock)}


def is_meant(rank: int) -> bool:
    """Whether this is the process that something happens to."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" or os.environ.get("TORCHELASTIC_RUN_ID", ".0")[-2:] != ".0":
        return False
    if rank == LAUNCHER:
        is_launcher = "RANK" not in os.environ and Path(sys.orig_argv[1]).name == "megatrain"
        return is_launcher and os.environ.get("SLURM_PROCID") == "0"
    return os.environ.get("RANK") == str(rank)


if __name__ == "sitecustomize" and VARIABLE in os.environ:
    wrong = json.loads(os.environ[VARIABLE])
    if is_meant(wrong.pop("rank")):
        KINDS[wrong.pop("kind")](told=Path(wrong.pop("told")), **wrong)
    elif PRELOAD in os.environ:  # Of a launcher, which starts the ranks.
        execute_anew({}, without=PRELOAD)
