"""What a Slurm job has done, in a file that grows: how outcomes come back without a connection.

Design choices:
- A record is a line of JSON, on disk before the next task's; one that a death cut short isn't read. A job that Slurm
  starts again writes on in the same file, on a new line.
- The files are there, empty, before the jobs start: a shared file system shows what was added to a file it knows, but
  may be slow to list a new one.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path


class Journal:
    """Written by a job."""

    def __init__(self, path: Path, where: str) -> None:
        """where: the machine, for people."""
        self._file = path.open("ab")
        self._write(b"\n" + json.dumps({"started_on": where}).encode())

    def add(self, task: int | None, outcome: bytes) -> None:
        """Notes how a task ended; None: how the job did."""
        self._write(json.dumps({"task": task, "outcome": base64.b64encode(outcome).decode()}).encode())

    def _write(self, record: bytes) -> None:
        self._file.write(record + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class Tail:
    """Reads what is added to a journal. started: a job has begun to write it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.started = False

    def new(self) -> list[tuple[int | None, bytes]]:
        """The tasks and outcomes that were added since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        self.started |= bool(whole)
        found = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short
                continue
            if "outcome" in record:
                found.append((record["task"], base64.b64decode(record["outcome"])))
        return found
