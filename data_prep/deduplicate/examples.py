"""Pairs of duplicates for people to look at: the document that went beside the one that stayed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from megatrain.data_prep.deduplicate.clusters import Summary
from megatrain.data_prep.notes import EXCERPT

Texts = Callable[[int, Collection[int]], dict[int, tuple[str, str]]]
"""Unit and rows to the rows' ids and texts."""


def shown(summary: Summary, texts: Texts) -> dict[str, Any]:
    """What the report says of duplicates: counts, cluster sizes, and pairs with excerpts; JSON."""
    pairs = {"exact": summary.exact_examples, "fuzzy": summary.fuzzy_examples}
    wanted: dict[int, set[int]] = defaultdict(set)
    for found in pairs.values():
        for pair in found:
            wanted[pair.unit].add(pair.row)
            wanted[pair.first_unit].add(pair.first_row)
    read = {unit: texts(unit, rows) for unit, rows in wanted.items()}
    examples = []
    for kind, found in pairs.items():
        for pair in found:
            kept, kept_text = read[pair.first_unit][pair.first_row]
            dropped, dropped_text = read[pair.unit][pair.row]
            examples.append(
                {
                    "kind": kind,
                    "kept": kept,
                    "dropped": dropped,
                    "kept_text": kept_text[:EXCERPT],
                    "dropped_text": dropped_text[:EXCERPT],
                }
            )
    counts = {"documents": summary.documents, "exact": summary.exact, "fuzzy": summary.fuzzy}
    return {**counts, "cluster_sizes": summary.clusters, "examples": examples}
