"""Filters against datatrove's: documents a CPU second through Gopher's quality and repetition, C4 and FineWeb.

    python -m benchmarks.filters [--documents N] [--rounds N] [--json FILE]

Design choices:
- Every document goes through all four, dropped or not: what is measured is the cost of deciding, whatever the corpus.
  FineWeb judges the lines that C4 has left.
- Documents are the text of this machine's installed packages, its documentation and its manual pages. Both take the
  same ones, each round others.
- What a process does once (imports, rules) is done before the first round. Our dictionary of words grows with what it
  has seen, so there is a row for a process that begins and one, which counts, for a process that goes on.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence

from datatrove.data import Document

from benchmarks.common import Bar, Result, main, rate, row, take_turns
from megatrain.data_prep.notes import Notes
from tests.data_prep.filters.peer import MANY, Recorded, batch, our_filters, real_documents, their_filters

STEPS = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
BATCH = 500
"""Documents of a batch: 3 MB of text."""
UNIT = "documents/s"


class Ours:
    """megatrain's filters."""

    def __init__(self) -> None:
        self.quality, self.repetition, self.c4, self.fineweb = map(our_filters().__getitem__, STEPS)

    def __call__(self, texts: Sequence[str]) -> float:
        for start in range(0, len(texts), BATCH):
            documents, notes = batch(texts[start : start + BATCH]), Recorded()
            self.quality(documents, Notes())
            self.repetition(documents, Notes())
            left = iter(self.c4(documents, notes).texts)
            judged = zip(documents.texts, notes.reasons, strict=True)
            self.fineweb(batch([next(left) if reason is None else text for text, reason in judged]), Notes())
        return float(len(texts))


class Theirs:
    """datatrove's filters."""

    def __init__(self) -> None:
        self.filters = [their_filters()[name] for name in STEPS]

    def __call__(self, texts: Sequence[str]) -> float:
        for text in texts:
            document = Document(text=text, id="0")
            for each in self.filters:
                each.filter(document)
        return float(len(texts))


def measure(options: Namespace) -> Result:
    """The table."""
    texts = real_documents(options.documents, MANY)
    ours, theirs = Ours(), Theirs()
    size = len(texts) // (2 * options.rounds)
    seen, rest = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    rounds = [rest[size * number : size * (number + 1)] for number in range(options.rounds)]
    for each in (ours, theirs):
        each(rest[-1:])
    first = [rate(lambda: ours(seen))]
    turns = {"datatrove": iter(rounds), "megatrain": iter(rounds)}
    rates = take_turns(
        {
            "datatrove": lambda: rate(lambda: theirs(next(turns["datatrove"]))),
            "megatrain": lambda: rate(lambda: ours(next(turns["megatrain"]))),
        },
        options.rounds,
    )
    base = rates["datatrove"]
    rows = [row(name, each, base, UNIT) for name, each in rates.items()]
    rows.append(row(f"megatrain, its first {len(seen):,} documents", first, base, UNIT))
    gain = statistics.median(rates["megatrain"]) / statistics.median(base)
    return Result(rows, [Bar("documents a CPU second, as a multiple of datatrove's", gain, 8)])


if __name__ == "__main__":
    sys.exit(main("Gopher quality and repetition, C4, FineWeb", measure, documents=8000, rounds=5))
