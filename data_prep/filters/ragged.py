"""Rows of different lengths, laid end to end: the words of documents, or their lines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.documents import Bools

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Where each row begins and ends. offsets: int64[rows + 1], from 0 to the count of values."""

    offsets: Int64

    @cached_property
    def counts(self) -> Int64:
        """Values of each row."""
        return np.diff(self.offsets)

    @cached_property
    def owners(self) -> Int64:
        """The row of each value."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def sums(self, values: Array) -> Int64:
        """The sum of each row of integers or bools."""
        before = np.zeros(len(values) + 1, np.int64)
        np.cumsum(values, out=before[1:])
        return np.diff(before[self.offsets])

    def repeats(self, values: Array) -> Bools:
        """Which of the values, integers from 0 below 2^32, were there before in their row."""
        _, first = np.unique(self.owners << 32 | values, return_index=True)
        repeated = np.ones(len(values), np.bool_)
        repeated[first] = False
        return repeated

    def of(self, kept: Bools) -> Bools:
        """Which values are in the rows that are kept."""
        return np.repeat(kept, self.counts)

    def keep(self, kept: Bools) -> Rows:
        """The rows that are kept."""
        return Rows.of_counts(self.counts[kept])

    @staticmethod
    def of_counts(counts: Array) -> Rows:
        """Rows of so many values each."""
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return Rows(offsets)
