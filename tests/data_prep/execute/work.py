"""Tasks for the tests of executors: each leaves a mark for every attempt, and its result in a file."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import GaveUp


@dataclass(frozen=True)
class Task:
    """what: "" or what happens to it. failing: attempts of which it is true."""

    number: int
    folder: str
    what: str = ""
    failing: int = 1000
    seconds: float = 0.0


def do(task: Task) -> int:
    """The square of the task's number; it is written too."""
    folder = Path(task.folder)
    (folder / f"{task.number}.{time.time_ns()}.attempt").touch()
    time.sleep(task.seconds)
    if len(attempts(folder, task.number)) <= task.failing:
        _fail(task)
    temporary = folder / f"{task.number}.{os.getpid()}"
    temporary.write_text(str(task.number**2))
    temporary.rename(folder / f"{task.number}.done")
    return task.number**2


def _fail(task: Task) -> None:
    match task.what:
        case "raise":
            raise ValueError(f"{task.number} is\nbad")
        case "give up":
            raise GaveUp("the disk is full")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "kill the job":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        case "allocate":
            bytearray(1 << 30)


def attempts(folder: Path, number: int) -> list[Path]:
    """A file for each time that a task was begun."""
    return list(folder.glob(f"{number}.*.attempt"))


def done(folder: Path) -> dict[int, int]:
    """The results in files."""
    return {int(path.stem): int(path.read_text()) for path in folder.glob("*.done")}


def squares(count: int) -> dict[int, int]:
    """What the tasks 0, 1, ... give."""
    return {number: number**2 for number in range(count)}
