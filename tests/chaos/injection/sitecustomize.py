"""Makes a rank of the real `megatrain` command die or wait at a named call that changes the disk.

Python imports it at the start of every process whose PYTHONPATH has this folder; the product has no hook for it. What
to do is JSON in the environment (VARIABLE); tests/chaos/runs.py writes it.

Design choices:
- The calls are wrapped, not profiled: a wrapper sees the path, so a point has a name, whatever thread makes the call
  and from whatever function of the product. Writes are those of the file below Python's buffer.
- A name has no step in it: "fsync step/state.json" is the first such call of the process, of any step; the second one
  in the same save is "..., number 2". What a start does before its first save (it removes what a death left) is
  "at start, ...".
"""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import re
import shutil  # noqa: F401  (it looks, once, which functions of os take a dir_fd: before they are wrapped)
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VARIABLE = "MEGATRAIN_TEST_INJECTION"
MARK = "MEGATRAIN_TEST_MARK"
"""All processes of a command have it in their environment (tests/distributed/command.py)."""
TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{32}")
"""What resilience/files.py calls a file before it is renamed."""
LONGEST_PAUSE = 60.0
"""Seconds."""


class Injection:
    """Follows the calls below one folder and acts at one of them.

    folder: the run's checkpoints. rank, point: whose call, and "before NAME" or "after NAME". action: "kill" this
    process, "kill all" of the command, or "pause": makes the file `pause` and goes on when that is gone.
    log: a file for the names of all calls, "rank 0: NAME", as they return.
    """

    def __init__(
        self, folder: str, rank: int = -1, point: str = "", action: str = "kill", pause: str = "", log: str = ""
    ) -> None:
        self.folder = folder
        self.rank = int(os.environ["RANK"])
        self.point = point if rank == self.rank else None
        self.action = action
        self.pause = Path(pause)
        self.log = log
        self.first = [f"open step/rank_{self.rank:05d}.bin"] if self.rank else ["mkdir step", "rename step.replaced"]
        self.saving = False
        self.seen = Counter[str]()

    @contextmanager
    def around(self, call: str, path: str) -> Iterator[None]:
        """A call that changes what is at `path`, absolute."""
        if not path.startswith(self.folder):
            yield
            return
        below = re.sub(r"step_\d+", "step", os.path.relpath(path, self.folder))
        name = f"{call} {TEMPORARY.sub('temporary', below)}"
        if name in self.first:
            self.saving = True
            self.seen.clear()
        if not self.saving:
            name = f"at start, {name}"
        self.seen[name] += 1
        if self.seen[name] > 1:
            name = f"{name}, number {self.seen[name]}"
        self.act(f"before {name}")
        yield
        if self.log:  # Not of calls that fail.
            with io.FileIO(self.log, "a") as file:
                file.write(f"rank {self.rank}: {name}\n".encode())
        self.act(f"after {name}")

    def act(self, point: str) -> None:
        if point != self.point:
            return
        self.point = None
        if self.action == "pause":
            self.pause.touch()
            deadline = time.monotonic() + LONGEST_PAUSE
            while self.pause.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            return
        if self.action == "kill all":
            for process in others():
                os.kill(process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def others() -> list[int]:
    """The other processes of this command."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended.
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def absolute(path: Any, *_: object, dir_fd: int | None = None, **__: object) -> str:
    """The path that a function of os was called with: a path or a descriptor, perhaps below another descriptor."""
    descriptors = Path("/proc/self/fd")
    if isinstance(path, int):
        return str((descriptors / str(path)).readlink())
    base = Path.cwd() if dir_fd is None else (descriptors / str(dir_fd)).readlink()
    return str(base / os.fsdecode(path))


def target(_source: Any, path: Any, *_: object, dst_dir_fd: int | None = None, **__: object) -> str:
    return absolute(path, dir_fd=dst_dir_fd)


CALLS: dict[str, Callable[..., str]] = {
    **dict.fromkeys(("fsync", "mkdir", "unlink", "rmdir"), absolute),
    **dict.fromkeys(("rename", "replace", "link"), target),
}
"""The functions of os that change the disk, and what each changes."""


def install(injection: Injection) -> None:
    """Wraps the calls of CALLS, and opening files to write."""

    def wrapped(name: str, path_of: Callable[..., str]) -> Callable[..., Any]:
        real = getattr(os, name)

        @functools.wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            with injection.around(name, path_of(*arguments, **options)):
                return real(*arguments, **options)

        return call

    class File(io.FileIO):
        """A file below the buffer."""

        def write(self, data: Any) -> int:
            with injection.around("write", str(self.name)):
                return super().write(data)

    real_open = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        if mode != "wb" or not str(file).startswith(injection.folder):
            return real_open(file, mode, buffering, *arguments, **options)
        with injection.around("open", str(file)):
            raw = File(file, mode)
        return raw if buffering == 0 else io.BufferedWriter(raw, buffering if buffering > 0 else io.DEFAULT_BUFFER_SIZE)

    for name, path_of in CALLS.items():
        setattr(os, name, wrapped(name, path_of))
    io.open = builtins.open = opened


if VARIABLE in os.environ and "megatrain.train" in sys.orig_argv:
    install(Injection(**json.loads(os.environ[VARIABLE])))
