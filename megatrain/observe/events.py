"""events.jsonl: what happened to a run (start, resume, save, skip, rollback, signal, stop), a JSON line each.

Design choices:
- The log is history: it is only added to, also by a run that continues; only rank 0 writes it.
- A line has `event`, `step` (the last one trained), `time` (seconds since 1970) and what else the event is about.
  `start` and `resume` say what the run report shows of the machine: `world_size`, `device` and `versions`.
- Whether a step was skipped is known on the device only, and to the host when the step's record has arrived. So a sink
  writes the `skip` event.
"""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path

from megatrain.observe.records import Record, encode

PACKAGES = ("megatrain", "torch", "deepspeed", "transformers")


class EventLog:
    """Adds to an events.jsonl, made where there is none."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a+b", buffering=0)
        size = self.file.seek(0, os.SEEK_END)
        if size:
            self.file.seek(size - 1)
            if self.file.read(1) != b"\n":
                self.file.write(b"\n")  # a dying process left half a line: it shall not take the next with it

    def write(self, event: str, step: int, **details: object) -> None:
        """Adds an event, durably. `details`: what JSON can say, without secrets."""
        line = {"event": event, "step": step, "time": round(time.time(), 3)} | details
        self.file.write(encode(line).encode() + b"\n")
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class SkipSink:
    """A sink of metrics that writes a `skip` event for each step whose record says `skipped`."""

    def __init__(self, events: EventLog) -> None:
        self.events = events

    def write(self, record: Record) -> None:
        if record.get("skipped"):
            step = record["step"]
            assert isinstance(step, int)
            self.events.write(
                "skip", step, **{name: record.get(name) for name in ("loss", "grad_norm", "target_count")}
            )

    def flush(self) -> None:
        """Events are written durably."""

    def close(self) -> None:
        """The log has other writers."""


def versions() -> dict[str, str]:
    """The versions a run depends on, by package, and Python's own."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
