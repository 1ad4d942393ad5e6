"""What the steps did to the documents of a unit: counts, and examples for people to judge them by.

Design choices:
- Notes of two units add up to those of both, in any order of adding that keeps units in order: counts are sums, and
  the examples kept are those whose documents have the least hashes, so the report doesn't depend on who did what.
- They are JSON: a unit's notes lie beside its results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash

from megatrain.data_prep.documents import Documents

EXAMPLES = 20
"""Of each reason."""
EXCERPT = 600
"""Characters of an example that are kept."""


@dataclass(frozen=True, order=True)
class Example:
    """A document that was dropped or changed. order: the hash of its id, by which examples are chosen.

    text: an excerpt. value: the figure that decided, as people read it; or what the text became.
    """

    order: int
    id: str
    text: str
    value: str


@dataclass
class Tally:
    """How many documents, and the bytes of their texts; examples of them."""

    documents: int = 0
    bytes: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds those of other documents."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples = sorted(self.examples + other.examples)[:EXAMPLES]

    @staticmethod
    def from_json(value: dict[str, Any]) -> Tally:
        """The reverse of asdict."""
        return Tally(**value | {"examples": [Example(**example) for example in value["examples"]]})


@dataclass
class Notes:
    """entered: documents that each step was given. dropped: by step and reason. changed: by step and what was done."""

    entered: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, dict[str, Tally]] = field(default_factory=dict)
    changed: dict[str, dict[str, Tally]] = field(default_factory=dict)

    def drop(
        self, step: str, documents: Documents, reasons: Sequence[str | None], values: Sequence[object] | None = None
    ) -> Documents:
        """Leaves out and notes the documents with a reason; gives the others.

        reasons: why a document is dropped, None: it isn't. values: what decided, a figure or a few words.
        """
        self.entered[step] += len(documents)
        self._note(self.dropped, step, documents, reasons, values)
        return documents.keep(np.array([reason is None for reason in reasons], np.bool_))

    def change(
        self, step: str, documents: Documents, what: Sequence[str | None], values: Sequence[object] | None = None
    ) -> None:
        """Notes the documents that were changed, by what was done. documents: as they were before."""
        self._note(self.changed, step, documents, what, values)

    def add(self, other: Notes) -> None:
        """Adds the notes of other documents."""
        self.entered += other.entered
        for own, others in ((self.dropped, other.dropped), (self.changed, other.changed)):
            for step, tallies in others.items():
                for reason, tally in tallies.items():
                    own.setdefault(step, {}).setdefault(reason, Tally()).add(tally)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"entered": dict(self.entered)}  # asdict takes a Counter for a list

    @staticmethod
    def from_json(value: dict[str, Any]) -> Notes:
        """The reverse of to_json."""
        dropped, changed = (
            {
                step: {reason: Tally.from_json(tally) for reason, tally in tallies.items()}
                for step, tallies in value[kind].items()
            }
            for kind in ("dropped", "changed")
        )
        return Notes(Counter(value["entered"]), dropped, changed)

    @staticmethod
    def _note(
        where: dict[str, dict[str, Tally]],
        step: str,
        documents: Documents,
        reasons: Sequence[str | None],
        values: Sequence[object] | None,
    ) -> None:
        rows = [row for row, reason in enumerate(reasons) if reason is not None]
        if not rows:
            return
        chosen = documents.batch.take(rows)
        sizes = pc.binary_length(chosen.column("text")).to_pylist()
        names = chosen.column("id").to_pylist()
        for place, (row, size, name) in enumerate(zip(rows, sizes, names, strict=True)):
            reason = reasons[row]
            assert reason is not None
            tally = where.setdefault(step, {}).setdefault(reason, Tally())
            tally.documents += 1
            tally.bytes += size
            order = xxhash.xxh3_64_intdigest(name.encode())
            if len(tally.examples) < EXAMPLES or order < tally.examples[-1].order:
                text = chosen.column("text")[place].as_py()[:EXCERPT]
                value = "" if values is None or values[row] is None else _figure(values[row])
                tally.examples = sorted([*tally.examples, Example(order, name, text, value)])[:EXAMPLES]


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
