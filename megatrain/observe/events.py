"""events.jsonl: what happened to a run (start, resume, segment, save, skip, bad_member, stop, ...), a JSON line each.

Design choices:
- The log is history: it is only added to, also by a run that continues; only rank 0 writes it.
- A line has `event`, `step` (the last one trained), `time` (seconds since 1970) and what else the event is about.
  `start` and `resume` say what the run report shows of the machine: `world_size`, `device` and `versions`.
- Whether a step was skipped is known on the device only, and to the host when the step's record has arrived. So a sink
  learns of it and writes the `skip` event.
"""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from megatrain.observe.records import LineFile, Record
from megatrain.resilience.anomalies import Anomalies, Measured

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
    """A sink of metrics that tells `anomalies` of each step, and writes a `skip` event for each that was skipped.

    events: None on ranks that write none; they have to know all the same.
    """

    def __init__(self, anomalies: Anomalies, events: EventLog | None) -> None:
        self.anomalies = anomalies
        self.events = events

    def write(self, record: Record) -> None:
        if "skipped" not in record:
            return  # Of an evaluation.
        values: Any = record
        step = values["step"]
        reason = self.anomalies.learn(
            Measured(
                step,
                loss=values["loss"],
                gradient_norm=values["grad_norm"],
                target_count=values["target_count"],
                skipped=values["skipped"],
                last_sample=values["last_sample"],
            )
        )
        if reason is not None and self.events is not None:
            names = ("loss", "grad_norm", "target_count", "first_sample", "last_sample")
            self.events.write("skip", step, reason=reason, **{name: values[name] for name in names})

    def flush(self) -> None:
        """Events are written durably."""

    def close(self) -> None:
        """The log has other writers."""


def versions() -> dict[str, str]:
    """The versions a run depends on, by package, and Python's own."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
