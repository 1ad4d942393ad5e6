"""events.jsonl: what happened to a run (start, resume, segment, save, skip, bad_member, stop, ...), a JSON line each.

Design choices:
- The log is history: it is only added to, also by a run that continues; only rank 0 writes it.
- A line has `event`, `step` (the last one trained), `time` (seconds since 1970) and what else the event is about.
  `start` and `resume` say what the run report shows of the machine: `world_size`, `device` and `versions`.
- Whether a step was skipped is known on the device only, and to the host when the step's record has arrived. So a sink
  writes the `skip` event.
"""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path

from megatrain.observe.records import LineFile, Record

PACKAGES = ("megatrain", "torch", "deepspeed", "transformers")


class EventLog:
    """Adds to an events.jsonl, made where there is none."""

    def __init__(self, path: Path) -> None:
        self._lines = LineFile(path)

    def write(self, event: str, step: int, **details: object) -> None:
        """Adds an event, durably. `details`: what JSON can say, without secrets."""
        self._lines.write({"event": event, "step": step, "time": round(time.time(), 3)} | details)
        self._lines.sync()

    def close(self) -> None:
        """Nothing is written after."""
        self._lines.close()


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
