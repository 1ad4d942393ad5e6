"""Which rule a document breaks first: what every filter that judges by thresholds is made of."""

from __future__ import annotations

import numpy as np

from megatrain.data_prep.documents import Bools, Documents
from megatrain.data_prep.filters.ragged import Array
from megatrain.data_prep.notes import Notes


class Rules:
    """Rules for a batch, applied in order; a document is dropped for the first that it breaks."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.reasons: list[str | None] = [None] * len(documents)
        self.values: list[object] = [None] * len(documents)

    def at_least(self, key: str, values: Array, least: float | Array) -> None:
        """Drops documents whose value is below. values: [documents]; least: one, or [documents]; key: its name."""
        self.drop(key, values < least, values)

    def at_most(self, key: str, values: Array, most: float | Array) -> None:
        """Drops documents whose value is above."""
        self.drop(key, values > most, values)

    def drop(self, key: str, broken: Bools, values: Array) -> None:
        """Drops documents that break a rule. values: what shows it."""
        for row in np.flatnonzero(broken):
            if self.reasons[row] is None:
                self.reasons[row], self.values[row] = key, values[row].item()

    def apply(self, step: str, notes: Notes) -> Documents:
        """The documents that broke none."""
        return notes.drop(step, self.documents, self.reasons, self.values)


def ratio(part: Array, whole: Array) -> Array:
    """part / whole; where there is nothing, 0."""
    return part / np.maximum(whole, 1)
