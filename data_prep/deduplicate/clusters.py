"""Pairs of documents joined to clusters, and for each unit the rows that go.

Design choices:
- Union-find with its parents in a mapped file, 8 bytes a document, for many pairs at a time. A document's parent is
  never later than itself, so the root of a cluster is its first document, the one that stays, whatever the order of the
  pairs. Roots are hooked below the least root that they are paired with, all at once, until none is left to hook
  (Shiloach and Vishkin 1982).
- Examples are documents with a key of the one that stays. Others of a cluster may be like it by way of others only.
- What is written is committed by the summary, last.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.deduplicate.by_unit import write_by_unit
from megatrain.data_prep.deduplicate.exchange import Join, all_pairs, read_plan
from megatrain.data_prep.deduplicate.words import Bools, Int64, mix
from megatrain.data_prep.files import AtomicFile
from megatrain.data_prep.notes import EXAMPLES
from megatrain.errors import GaveUp

AT_ONCE = 1 << 19
"""Pairs, or documents, that are worked on together."""
REMOVED, SUMMARY = "removed", "summary.json"
RECORD = np.dtype([("row", "<u4"), ("is_exact", "?"), ("first_unit", "<u4"), ("first_row", "<u4")])
"""A document that goes: its row in its unit; whether an earlier text is the same, else one is almost; and the first
document of its cluster, which stays."""


@dataclass(frozen=True, order=True)
class Pair:
    """An example. order: by which it was chosen. (unit, row) goes, (first_unit, first_row) stays."""

    order: int
    unit: int
    row: int
    first_unit: int
    first_row: int


@dataclass
class Summary:
    """What was found. clusters: how many there are by their size, in powers of two ("2", "3-4", "5-8", ...)."""

    documents: int = 0
    exact: int = 0
    fuzzy: int = 0
    clusters: dict[str, int] = field(default_factory=dict)
    exact_examples: list[Pair] = field(default_factory=list)
    fuzzy_examples: list[Pair] = field(default_factory=list)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Summary:
        """The reverse of asdict."""
        examples = {name: [Pair(**pair) for pair in value[name]] for name in ("exact_examples", "fuzzy_examples")}
        return Summary(**value | examples)


@dataclass(frozen=True)
class Clusters:
    """Of all documents. parents: int64[documents]. is_exact: bool[documents], whether an earlier text is the same.
    is_direct: bool[documents], whether it is like the root itself. others: uint32[documents], how many have this root.
    """

    parents: Int64
    is_exact: Bools
    is_direct: Bools
    others: npt.NDArray[np.uint32]


def find_clusters(task: Join) -> None:
    """Joins all pairs of a plan; leaves REMOVED, of RECORD by unit, and the summary."""
    folder = task.folder
    if (Path(folder) / SUMMARY).exists():
        return
    count = read_plan(folder).starts[-1]
    summary = Summary(count)
    with (
        _scratch(folder, "parents", count, np.int64) as parents,
        _scratch(folder, "is_exact", count, np.bool_) as is_exact,
        _scratch(folder, "is_direct", count, np.bool_) as is_direct,
        _scratch(folder, "others", count, np.uint32) as others,
    ):
        for start in range(0, count, AT_ONCE):
            parents[start : start + AT_ONCE] = np.arange(start, min(start + AT_ONCE, count))
        for exact, pairs in all_pairs(folder, AT_ONCE):
            union(parents, pairs)
            if exact:
                is_exact[pairs[:, 0]] = True
        for _, pairs in all_pairs(folder, AT_ONCE):
            is_direct[pairs[parents[pairs[:, 1]] == pairs[:, 1], 0]] = True
        clusters = Clusters(parents, is_exact, is_direct, others)
        write_by_unit(Path(folder) / REMOVED, _removed(folder, clusters, summary))
        summary.clusters = _histogram(others)
    with AtomicFile(Path(folder) / SUMMARY) as file:
        file.write(json.dumps(asdict(summary)).encode())


def union(parents: Int64, pairs: Int64) -> None:
    """Joins the clusters of each of int64[pairs, 2]. parents: int64[documents], none later than its document."""
    while len(pairs):
        roots = find(parents, pairs.ravel()).reshape(-1, 2)
        pairs = roots[roots[:, 0] != roots[:, 1]]
        np.minimum.at(parents, np.maximum(pairs[:, 0], pairs[:, 1]), np.minimum(pairs[:, 0], pairs[:, 1]))


def find(parents: Int64, documents: Int64) -> Int64:
    """The root of each of `documents`, int64[any], which become their parents."""
    found = parents[documents]
    while True:
        above = parents[found]
        if np.array_equal(above, found):
            return found
        parents[documents] = found = above


def _removed(folder: str, clusters: Clusters, summary: Summary) -> Iterator[npt.NDArray[np.void]]:
    """RECORDs of each unit, in order. Counts them in `summary`, and in `clusters.others`."""
    starts = np.array(read_plan(folder).starts)
    for unit, (start, end) in enumerate(pairwise(starts.tolist())):
        roots = find(clusters.parents, np.arange(start, end))
        rows = np.flatnonzero(roots != np.arange(start, end))
        roots = roots[rows]
        np.add.at(clusters.others, roots, np.uint32(1))
        records = np.zeros(len(rows), RECORD)
        records["row"], records["is_exact"] = rows, clusters.is_exact[start + rows]
        records["first_unit"] = np.searchsorted(starts, roots, side="right") - 1
        records["first_row"] = roots - starts[records["first_unit"]]
        is_exact, is_direct = records["is_exact"], clusters.is_direct[start + rows]
        summary.exact += int(is_exact.sum())
        summary.fuzzy += int((~is_exact).sum())
        summary.exact_examples = _least(summary.exact_examples, unit, records[is_exact & is_direct])
        summary.fuzzy_examples = _least(summary.fuzzy_examples, unit, records[~is_exact & is_direct])
        yield records


def _least(examples: list[Pair], unit: int, records: npt.NDArray[np.void]) -> list[Pair]:
    """The examples after these records: those whose hashes are the least."""
    orders = mix(records["row"] + (np.uint64(unit) << np.uint64(32)))
    least = np.argsort(orders)[:EXAMPLES]
    new = [
        Pair(int(orders[place]), unit, *(int(records[place][name]) for name in ("row", "first_unit", "first_row")))
        for place in least
    ]
    return sorted(examples + new)[:EXAMPLES]


def _histogram(others: npt.NDArray[np.uint32]) -> dict[str, int]:
    """Clusters by their size; others: uint32[documents], how many go in favour of each document."""
    counts: Counter[int] = Counter()
    for start in range(0, len(others), AT_ONCE):
        sizes = others[start : start + AT_ONCE]
        powers, found = np.unique(np.ceil(np.log2(sizes[sizes > 0] + np.float64(1))).astype(int), return_counts=True)
        counts.update(dict(zip(powers.tolist(), found.tolist(), strict=True)))
    return {f"{2 ** (power - 1) + 1}-{2**power}" if power > 1 else "2": counts[power] for power in sorted(counts)}


@contextlib.contextmanager
def _scratch(folder: str, name: str, count: int, dtype: type[np.generic]) -> Iterator[npt.NDArray[Any]]:
    """An array of zeros in a mapped file of this process alone, which is gone afterwards."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".partial") as file:
        try:
            # A full disk is an error here; in a mapping it kills.
            os.posix_fallocate(file.fileno(), 0, max(1, count) * np.dtype(dtype).itemsize)
        except OSError as error:
            raise GaveUp(f"{file.name}: can't be written: {error.strerror}") from error
        yield np.asarray(np.memmap(file.name, dtype, "r+"))[:count]
