"""What a person sees while documents are prepared, and at the end."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from megatrain.data_prep import report
from megatrain.data_prep.counts import Amount, Counts
from megatrain.data_prep.read.records import Problem
from megatrain.data_prep.report import Meter, Report


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LINE_SECONDS", 0.0)
    bar, lines = (Console(file=io.StringIO(), force_terminal=terminal, width=120) for terminal in (True, False))
    for console in (bar, lines):
        with Meter(console, "preparing", 4_000_000) as meter:
            meter.advance(1_000_000, 1234, 5_000)
            meter.advance(3_000_000, 1000, 5_000)
    assert isinstance(bar.file, io.StringIO)
    assert isinstance(lines.file, io.StringIO)
    assert "━" in bar.file.getvalue()
    assert "2,234 documents" in bar.file.getvalue()
    first, last = lines.file.getvalue().splitlines()
    assert re.fullmatch(r"preparing: 25% of 4.0 MB, 1,234 documents, [\d,.]+ MB/s, [\d,]+ tokens/s, \d+ s left", first)
    assert last.startswith("preparing: 100% of 4.0 MB, 2,234 documents, ")
    assert last.endswith(" tokens/s, 0 s left")


def test_the_table_names_what_was_left_out_as_it_is_written() -> None:
    counts = Counts(records=13)
    counts.amount("train", ("web", "en")).add(Amount(documents=9, bytes=340, tokens=90))
    counts.amount("held_out", ("web", "en")).add(Amount(documents=1, bytes=10, tokens=10))
    counts.add_problem("a.jsonl", Problem("empty", "a.jsonl:7"))
    counts.broken["b.gz"] = "[errno 5] no [bold]luck"
    console = Console(file=io.StringIO(), width=120)
    Report(counts, files=3, exit_code=3, reason="1 broken [file]").show(console, Path("out"))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for text in (
        "10 of 13, 1 of them held out",
        "3.50",
        "1, the first at a.jsonl:7",
        "left out: [errno 5] no [bold]luck",
    ):
        assert text in shown
    assert shown.splitlines()[-1] == "incomplete (exit code 3): 1 broken [file]"
