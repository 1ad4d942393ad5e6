"""What is a crash loop, and what isn't."""

from __future__ import annotations

import pytest

from megatrain.resilience.crashes import crash_loop

ROWS = {
    "": False,
    "c5 c5": False,
    "c5 c5 c5": True,
    "start0 c5 resume4 c5 resume4 save5 c5": True,
    "c1 c9 c5 c5 c5": True,
    "c5 c7 c6": True,
    "c5 c8 c6": False,
    "c5 c5 stop5 c5": False,
    "c5 c5 c5 stop5": False,
    "c5 c5 c40 c5 c5": False,
    "c0 c0 c0": True,
}
"""Events with their steps; c: crash."""


@pytest.mark.parametrize("row", ROWS)
def test_three_in_a_row_at_the_same_step(row: str) -> None:
    events = []
    for word in row.split():
        kind = word.rstrip("0123456789")
        events.append({"event": "crash" if kind == "c" else kind, "step": int(word[len(kind) :]), "reason": "of it"})
    line = crash_loop(events, 3)
    assert (line is not None) == ROWS[row]
    assert crash_loop(events, 0) is None
    if line:
        assert line.startswith("crash loop: died 3 times in a row at step ")
        assert line.endswith("because of it")
