"""A crash loop: a run that dies again and again at the same step gets nowhere, whoever starts it.

Design choices:
- Deaths are events of events.jsonl: they are counted across jobs, and nothing else has to be kept.
- A start that ends otherwise (done, stopped, given up) has a `stop` event, and the count begins again: who starts a run
  that has given up means it.
- A death's step is the last one that was written down. With a GPU, metrics are read up to NEAR steps later, so that
  steps which differ by that count as the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

CRASH = "crash"
STOP = "stop"
NEAR = 2


def crash_loop(events: Iterable[Mapping[str, object]], deaths: int) -> str | None:
    """The line that says so, where the last `deaths` of a run were in a row and at the same step; 0: never."""
    row: list[Mapping[str, object]] = []
    for event in events:
        if event["event"] == CRASH:
            row.append(event)
        elif event["event"] == STOP:
            row.clear()
    last = row[-deaths:] if deaths else []
    steps = [step for event in last if isinstance(step := event["step"], int)]
    if len(steps) < max(1, deaths) or max(steps) - min(steps) > NEAR:
        return None
    return f"crash loop: died {deaths} times in a row at step {max(steps)}, the last time because {last[-1]['reason']}"
