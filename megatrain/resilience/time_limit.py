"""The end of a job is known beforehand: a run saves before it, also where no signal comes.

Design choices:
- What stopping takes is what it has taken so far: twice the longest save, a step as long as the longest (with an
  evaluation in it), the steps until all ranks stop, and SPARE_SECONDS. The first step, which compiles, isn't counted.
  At most half of the time is left over: the rest is for training, however short a job is.
- One rank looks, once a step, at its own monotonic clock. The clocks of hosts are compared once, at its start; Slurm's
  own messages already need them within minutes of each other.
- Slurm says in the environment when a job ends; before version 23.02 one has to ask squeue.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping

JOB_END = "SLURM_JOB_END_TIME"
"""Seconds since 1970."""
SPARE_SECONDS = 30.0
"""What is left when all is saved, if all goes as before."""
FIRST_SAVE_SECONDS = 60.0
"""How long a save is taken to be while none has ended."""


class TimeLimit:
    """Whether the time that is left gets short. ends: seconds since 1970.

    save_seconds: the longest save so far, None before the first. clock: seconds that nobody sets.
    """

    def __init__(
        self, ends: float, save_seconds: Callable[[], float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._save_seconds = save_seconds
        self._clock = clock
        left = ends - time.time()
        self._ends, self._most = clock() + left, left / 2
        self._asked: float | None = None
        self._last = self._longest = 0.0

    def is_short(self, steps_ahead: int) -> bool:
        """Asked once a step: whether to stop after steps_ahead more."""
        now = self._clock()
        step = 0.0 if self._asked is None else now - self._asked
        usual = min(step, self._last)
        self._asked, self._last, self._longest = now, step, max(step, self._longest)
        save = self._save_seconds()
        saving = 2 * (FIRST_SAVE_SECONDS if save is None else save)
        needed = self._longest + steps_ahead * usual + saving + SPARE_SECONDS
        return now + min(needed, self._most) > self._ends


def end_of_time(seconds: float | None, began: float, environment: Mapping[str, str] = os.environ) -> float | None:
    """When a run that began at `began` has to end, both since 1970: after `seconds`, else with its Slurm job."""
    if seconds is not None:
        return began + seconds
    if JOB_END in environment:
        return float(environment[JOB_END])
    if "SLURM_JOB_ID" not in environment:
        return None
    command = ["squeue", "--noheader", f"--jobs={environment['SLURM_JOB_ID']}", "--format=%L"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # In a container without Slurm's commands: the signal before the end remains.
    left = seconds_of(said)
    return None if left is None else time.time() + left


def seconds_of(time_left: str) -> float | None:
    """What squeue means by 4:05, 1:04:05 or 2-01:04:05; None for anything else (UNLIMITED)."""
    days, _, clock = time_left.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in [days or "0", *parts]):
        return None
    hours, minutes, seconds = [0, 0, *map(int, parts)][-3:]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
