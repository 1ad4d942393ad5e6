"""What a person and a program see of `megatrain prep`: progress, the table at the end, report.json.

Design choices:
- A bar on a terminal, a line every few seconds elsewhere.
- report.json names every problem by file, and why the exit code is what it is. It alone holds times.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatrain.data.format import HELD_OUT
from megatrain.data_prep.counts import Counts
from megatrain.data_prep.files import AtomicFile
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.units import SPLITS

REPORT = "report.json"
PAGE = "report.html"
LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""


class Meter:
    """Progress of one kind of tasks, over the sum of their sizes, as a context."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        """what: is done. total: bytes of the input."""
        self._console = console
        self._what = what
        self._total = max(total, 1)
        self._done = self._documents = self._tokens = 0
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(self._what, total=self._total, figures="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: int, documents: int, tokens: int) -> None:
        """So many bytes of the input, and what came of them, are done."""
        self._done, self._documents, self._tokens = (
            self._done + size,
            self._documents + documents,
            self._tokens + tokens,
        )
        if self._bar:
            self._bar.update(self._task, completed=self._done, figures=self._figures())
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            left = (self._total - self._done) * (self._said - self._began) / self._done
            line = f"{self._what}: {self._done / self._total:.0%} of {_megabytes(self._total)}, {self._figures()}"
            self._console.print(f"{line}, {left:,.0f} s left", highlight=False)

    def _figures(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rates = f"{_megabytes(self._done / seconds)}/s"
        if not self._documents:
            return rates
        return f"{self._documents:,} documents, {rates}, {self._tokens / seconds:,.0f} tokens/s"


@dataclass
class Report:
    """All that report.json says; it is filled while the run goes on. `reason` is None with exit code 0."""

    counts: Counts = field(default_factory=Counts)
    notes: Notes = field(default_factory=Notes)
    files: int = 0
    ignored_files: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, Any] | None = None
    shards: int = 0
    backend: str = ""
    backend_reason: str = ""
    seconds: float = 0.0
    exit_code: int = 0
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report, as it is written."""
        counts, total = self.counts, self.counts.total()
        return {
            "exit_code": self.exit_code,
            "reason": self.reason,
            "files": self.files,
            "ignored_files": self.ignored_files,
            "failed_units": self.failed,
            "broken_files": counts.broken,
            "problems": {name: dict(kinds) for name, kinds in counts.problems.items()},
            "first_problem": counts.first_problem,
            "records": counts.records,
            "documents": {split: counts.total(split).documents for split in SPLITS},
            "tokens": {split: counts.total(split).tokens for split in SPLITS},
            "text_bytes": total.bytes,
            "bytes_per_token": round(total.bytes / total.tokens, 4) if total.tokens else None,
            "sources_and_languages": [
                {"split": split, "source": source, "language": language, **vars(amount)}
                for split, kinds in counts.amounts.items()
                for (source, language), amount in sorted(
                    kinds.items(), key=lambda item: [name or "" for name in item[0]]
                )
            ],
            "documents_by_log2_tokens": counts.lengths,
            "steps": self.notes.to_json(),
            "duplicates": self.duplicates,
            "shards": self.shards,
            "backend": self.backend,
            "backend_reason": self.backend_reason,
            "ids_compared": {"documents": counts.compared, "different": counts.different},
            "seconds": round(self.seconds, 3),
        }

    def write(self, folder: Path) -> None:
        """Writes report.json, and the same as a page."""
        from megatrain.data_prep.report_page import page  # jinja2 takes its time, and a report is written once

        report = self.to_json()
        with AtomicFile(folder / REPORT) as file:
            file.write(json.dumps(report, indent=1).encode())
        with AtomicFile(folder / PAGE) as file:
            file.write(page(report).encode())

    def show(self, console: Console, folder: Path) -> None:
        """Prints the table."""
        counts, total, held_out = self.counts, self.counts.total(), self.counts.total(HELD_OUT)
        kinds = sorted({kind for found in counts.problems.values() for kind in found})
        rows = {
            "files": f"{self.files:,}" + (f" ({self.ignored_files:,} others ignored)" if self.ignored_files else ""),
            "documents": f"{total.documents:,} of {counts.records:,}, {held_out.documents:,} of them held out",
            "text": _megabytes(total.bytes),
            "tokens": f"{total.tokens:,}, {held_out.tokens:,} of them held out",
            "bytes per token": f"{total.bytes / max(total.tokens, 1):.2f}",
            "shards": f"{self.shards:,}",
            "seconds": f"{self.seconds:.1f} ({_megabytes(total.bytes / max(self.seconds, 1e-9))}/s)",
            "tokenized by": f"{self.backend}: {self.backend_reason}",
            **{
                f"dropped: {step}, {reason}": f"{tally.documents:,} documents, {_megabytes(tally.bytes)}"
                for step in self.notes.entered
                for reason, tally in self.notes.dropped.get(step, {}).items()
            },
            **{
                f"bad records: {kind}": f"{sum(found[kind] for found in counts.problems.values()):,}, "
                f"the first at {counts.first_problem[kind]}"
                for kind in kinds
            },
            **{f"broken file {name}": f"left out: {why}" for name, why in counts.broken.items()},
        }
        table = Table(title=Text(str(folder)), show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        console.print(table)
        if self.reason:
            console.print(f"incomplete (exit code {self.exit_code}): {self.reason}", highlight=False, markup=False)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
