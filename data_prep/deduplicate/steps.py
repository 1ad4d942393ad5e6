"""The steps that take out what the exchanges between units have found.

Design choices:
- There is one of each for a unit, and it is given all batches of that unit, in the order in which the keys were made:
  the steps count the rows themselves. RepeatedLines comes after RemovedDocuments, if both are there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatrain.data_prep.deduplicate.by_unit import ByUnit
from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.duplicates import Duplicates
from megatrain.data_prep.deduplicate.paragraphs import LINE, LineKeys, line_keys
from megatrain.data_prep.deduplicate.words import Bools, Int64
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes


class RemovedDocuments:
    """Drops the documents that are duplicates."""

    name = "duplicates"

    def __init__(self, duplicates: Duplicates, unit: int) -> None:
        self._removed = {int(record["row"]): record for record in duplicates.removed(unit)}
        self._row = 0

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        found = [self._removed.get(self._row + number) for number in range(len(documents))]
        self._row += len(documents)
        reasons = [None if record is None else "exact" if record["is_exact"] else "fuzzy" for record in found]
        values = [
            None if record is None else f"document {record['first_row']} of unit {record['first_unit']} stays"
            for record in found
        ]
        return notes.drop(self.name, documents, reasons, values)


class RepeatedLines:
    """Takes lines out of all documents but the first that has them, and drops documents that are left with little."""

    name = "paragraphs"

    def __init__(self, repeated: Path, duplicates: Duplicates | None, unit: int, config: DeduplicateConfig) -> None:
        """repeated: the file that find_paragraphs gave. duplicates: what it was given.

        Raises GaveUp where the file isn't whole.
        """
        lines = ByUnit(repeated, LINE)[unit]
        self._keys, self._keepers = np.array(lines["key"]), np.array(lines["row"])
        removed = np.array(duplicates.removed(unit)["row"] if duplicates else (), np.int64)
        self._before = removed - np.arange(len(removed))
        self._config = config
        self._number = 0

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        numbers = np.arange(self._number, self._number + len(documents))
        self._number += len(documents)
        rows = numbers + np.searchsorted(self._before, numbers, side="right")  # those that went are counted too
        keys = line_keys(documents, self._config)
        document = np.repeat(np.arange(len(documents)), keys.counts)
        goes = self._goes(keys, rows[document])
        if not goes.any():
            return notes.drop(self.name, documents, [None] * len(documents))
        return self._without(documents, document[goes], keys.place[goes], notes)

    def _goes(self, keys: LineKeys, rows: Int64) -> Bools:
        """bool[lines]: which of them another document keeps. rows: int64[lines], where they are."""
        if not len(self._keys):
            return np.zeros(len(rows), np.bool_)
        at = np.minimum(np.searchsorted(self._keys, keys.key), len(self._keys) - 1)
        found: Bools = (self._keys[at] == keys.key) & (self._keepers[at] != rows)
        return found

    def _without(self, documents: Documents, numbers: Int64, places: Int64, notes: Notes) -> Documents:
        """The documents without these lines: `places` in the documents of `numbers`, int64[lines]."""
        texts = list(documents.texts)
        reasons: list[str | None] = [None] * len(texts)
        what: list[str | None] = [None] * len(texts)
        values: list[str | None] = [None] * len(texts)
        for number in np.unique(numbers).tolist():
            lines = texts[number].split("\n")
            gone = places[numbers == number].tolist()
            values[number] = f"{len(gone)} of {len(lines)} lines, the first: {lines[gone[0]][:200]}"
            for place in reversed(gone):
                del lines[place]
            texts[number] = "\n".join(lines)
            is_little = len(texts[number].strip()) < self._config.paragraphs.min_left_characters
            reasons[number], what[number] = ("little_left", None) if is_little else (None, "repeated_lines")
        notes.change(self.name, documents, what, values)
        kept = notes.drop(self.name, documents, reasons, values)
        return kept.with_texts([text for text, reason in zip(texts, reasons, strict=True) if reason is None])
