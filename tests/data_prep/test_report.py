"""What a person sees while documents are prepared, and at the end."""

import io
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from megatrain.data_prep import report
from megatrain.data_prep.read.records import Problem
from megatrain.data_prep.report import Meter, Report
from megatrain.data_prep.units import Counts


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LINE_SECONDS", 0.0)
    bar, lines = (Console(file=io.StringIO(), force_terminal=terminal, width=120) for terminal in (True, False))
    for console in (bar, lines):
        with Meter(console, 4_000_000) as meter:
            meter.advance(1_000_000, 1234)
            meter.advance(3_000_000, 1000)
    assert isinstance(bar.file, io.StringIO)
    assert isinstance(lines.file, io.StringIO)
    assert "━" in bar.file.getvalue()
    assert "2,234 documents" in bar.file.getvalue()
    assert lines.file.getvalue().splitlines() == [
        "preparing: 25% of 4.0 MB, 1,234 documents",
        "preparing: 100% of 4.0 MB, 2,234 documents",
    ]


def test_the_table_names_what_was_left_out_as_it_is_written() -> None:
    counts = Counts(documents=Counter(train=9, held_out=1), tokens=Counter(train=90, held_out=10), text_bytes=350)
    counts.add_problem("a.jsonl", Problem("empty", "a.jsonl:7"))
    counts.broken["b.gz"] = "[errno 5] no [bold]luck"
    console = Console(file=io.StringIO(), width=120)
    Report(counts, files=3, exit_code=3, reason="1 broken [file]").show(console, Path("out"))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for text in ("10, 1 of them held out", "3.50", "1, the first at a.jsonl:7", "left out: [errno 5] no [bold]luck"):
        assert text in shown
    assert shown.splitlines()[-1] == "incomplete (exit code 3): 1 broken [file]"
