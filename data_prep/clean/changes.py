"""What the steps of cleaning have in common: putting other texts in place of a batch's, and noting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes

SHOWN = 60
"""Characters on each side of a change that an example has."""


@dataclass(frozen=True)
class Change:
    """How the text of a row changed. As a string it is the first place that did; made for the examples alone."""

    old: pa.Array
    new: pa.Array
    row: int

    def __str__(self) -> str:
        old, new = self.old[self.row].as_py(), self.new[self.row].as_py()
        same = zip(old, new, strict=False)
        place = next((i for i, (before, after) in enumerate(same) if before != after), min(len(old), len(new)))
        shown = slice(max(0, place - SHOWN), place + SHOWN)
        return f"{old[shown]!r} became {new[shown]!r}"


def replace(step: str, documents: Documents, new: pa.Array, what: Sequence[str | None], notes: Notes) -> Documents:
    """The documents with other texts, without those that are empty then.

    new: large_string[documents]. what: how each was changed, None: it wasn't.
    """
    old = documents.batch.column("text")
    rows = range(len(documents))
    notes.change(step, documents, what, [Change(old, new, row) if what[row] else None for row in rows])
    empty = pc.or_(pc.equal(pc.binary_length(new), 0), pc.utf8_is_space(new)).to_numpy(zero_copy_only=False)
    notes.drop(step, documents, ["empty" if empty[row] else None for row in rows])
    if not any(what):
        return documents
    return documents.with_column("text", new).keep(~empty)


def replace_where_different(step: str, documents: Documents, new: pa.Array, what: str, notes: Notes) -> Documents:
    """The same, where whether a document was changed is seen from its text."""
    different = pc.not_equal(documents.batch.column("text"), new).to_numpy(zero_copy_only=False)
    return replace(step, documents, new, [what if each else None for each in different], notes)
