"""What a person and a program see of `megatrain prep`: progress, the table at the end, report.json.

Design choices:
- A bar on a terminal, a line every few seconds elsewhere.
- report.json names every problem by file, and why the exit code is what it is. It alone holds times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatrain.data.format import HELD_OUT, TRAIN, ShardEntry
from megatrain.data_prep.shards import AtomicFile
from megatrain.data_prep.units import Counts

REPORT = "report.json"
LINE_SECONDS = 10.0
"""Between lines of progress where there is no terminal."""


class Meter:
    """Progress over the bytes of the input, as a context."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._documents = 0
        self._said = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[documents]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=self._total, documents="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, size: int, documents: int) -> None:
        """So many bytes of input and documents more are done."""
        self._done += size
        self._documents += documents
        if self._bar:
            self._bar.update(self._task, completed=self._done, documents=f"{self._documents:,} documents")
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            share = self._done / max(self._total, 1)
            self._console.print(f"preparing: {share:.0%} of {_megabytes(self._total)}, {self._documents:,} documents")


@dataclass
class Report:
    """All that report.json says. `counts` is filled while the run goes on; `reason` is None with exit code 0."""

    counts: Counts
    files: int = 0
    ignored_files: int = 0
    shards: Sequence[ShardEntry] = ()
    backend: str = ""
    backend_reason: str = ""
    seconds: float = 0.0
    exit_code: int = 0
    reason: str | None = None

    def write(self, folder: Path) -> None:
        """Writes report.json."""
        counts, tokens = self.counts, self.counts.tokens.total()
        report = {
            "exit_code": self.exit_code,
            "reason": self.reason,
            "files": self.files,
            "ignored_files": self.ignored_files,
            "broken_files": counts.broken,
            "documents": {split: counts.documents[split] for split in (TRAIN, HELD_OUT)},
            "tokens": {split: counts.tokens[split] for split in (TRAIN, HELD_OUT)},
            "text_bytes": counts.text_bytes,
            "bytes_per_token": round(counts.text_bytes / tokens, 4) if tokens else None,
            "shards": len(self.shards),
            "problems": {name: dict(kinds) for name, kinds in counts.problems.items()},
            "first_problem": counts.first_problem,
            "backend": self.backend,
            "backend_reason": self.backend_reason,
            "seconds": round(self.seconds, 3),
        }
        with AtomicFile(folder / REPORT) as file:
            file.write(json.dumps(report, indent=1).encode())

    def show(self, console: Console, folder: Path) -> None:
        """Prints the table."""
        counts, tokens = self.counts, self.counts.tokens.total()
        kinds = sorted({kind for found in counts.problems.values() for kind in found})
        rows = {
            "files": f"{self.files:,}" + (f" ({self.ignored_files:,} others ignored)" if self.ignored_files else ""),
            "documents": f"{counts.documents.total():,}, {counts.documents[HELD_OUT]:,} of them held out",
            "text": _megabytes(counts.text_bytes),
            "tokens": f"{tokens:,}, {counts.tokens[HELD_OUT]:,} of them held out",
            "bytes per token": f"{counts.text_bytes / max(tokens, 1):.2f}",
            "shards": f"{len(self.shards):,}",
            "seconds": f"{self.seconds:.1f} ({_megabytes(counts.text_bytes / max(self.seconds, 1e-9))}/s)",
            "tokenized by": f"{self.backend}: {self.backend_reason}",
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
