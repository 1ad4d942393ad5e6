"""A task, tried until it is done or has failed too often: what all executors share.

Design choices:
- A task that raises, or whose process is lost, is tried again, behind those that haven't been tried; after that it is
  a Failure, and the others go on. Only a MegatrainError ends the work at once: it says that trying again won't help.
- Errors cross processes as what they are, with their traceback as a note; those that don't pickle, as their text.
"""

from __future__ import annotations

import os
import pickle
import resource
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatrain.errors import MegatrainError


@dataclass(frozen=True)
class Failure:
    """A task that was given up. reason: one line. attempts: how often it was tried. details: a traceback, or empty."""

    reason: str
    attempts: int
    details: str = ""


class WorkerDiedError(Exception):
    """The process that had a task was lost. `task` is the task's number; the text says how it ended."""

    def __init__(self, task: int, how: str) -> None:
        super().__init__(task, how)
        self.task = task
        self.how = how

    def __str__(self) -> str:
        return self.how


class Attempts:
    """Which tasks wait to be tried, and how often each has failed."""

    def __init__(self, tasks: Iterable[int], retries: int) -> None:
        self.waiting = deque(tasks)
        self._retries = retries
        self._failed: Counter[int] = Counter()

    def failed(self, task: int, error: Exception) -> Failure | None:
        """Notes a failed attempt; None: the task waits again. Raises the error if it is a MegatrainError."""
        if isinstance(error, MegatrainError):
            raise error
        self._failed[task] += 1
        if self._failed[task] <= self._retries:
            self.waiting.append(task)
            return None
        return Failure(reason(error), self._failed[task], "\n".join(getattr(error, "__notes__", [])))


def reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, WorkerDiedError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@cache  # once a process, whatever it had allocated before
def prepare_process(memory_bytes: int | None) -> None:
    """What a process does before its first task. memory_bytes: what it may allocate on top of what it has."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    os.environ["RAYON_NUM_THREADS"] = "1"
    if memory_bytes is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + memory_bytes, most))


def attempt(function: Callable[[Any], Any], task: object) -> bytes:
    """Tries a task: its result or the error that it raised, pickled, for `outcome`."""
    try:
        return pickle.dumps((function(task), None))
    except Exception as error:  # whatever it is, it belongs to the process that waits for the result
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
        return pickle.dumps((None, _portable(error)))


def outcome(data: bytes) -> tuple[Any, Exception | None]:
    """What `attempt` gave, in the process that waits for it: the result, or None and the error."""
    result, error = pickle.loads(data)
    return result, error


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it can't be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind: the classes of errors are anyone's
        stand_in = RuntimeError(reason(error))
        stand_in.__notes__ = list(error.__notes__)
        return stand_in
    return error
