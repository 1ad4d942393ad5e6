"""What goes and what stays, against a comparison of every document with every other, in any order of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.duplicates import Duplicates, find_duplicates
from megatrain.data_prep.deduplicate.keys import Keys, write_keys
from megatrain.data_prep.files import AtomicFolder
from tests.data_prep.deduplicate.common import fast_folder, run_shuffled

Document = tuple[int, tuple[int, int] | None]
"""Its text's key; the keys of its two bands, None without words."""

documents = st.tuples(st.integers(0, 5), st.none() | st.tuples(st.integers(0, 5), st.integers(0, 5)))
SPREAD = 2**64 // 6


def keys(unit: Sequence[Document]) -> Keys:
    """Keys over all their range; two texts have one first half of their key."""
    return Keys(
        np.array([[max(text, 1) * SPREAD, text] for text, _ in unit], np.uint64).reshape(-1, 2),
        np.array([[band * SPREAD for band in bands or (0, 0)] for _, bands in unit], np.uint64).reshape(-1, 2),
        np.array([bands is not None for _, bands in unit], np.bool_),
    )


def write_units(folder: Path, units: Sequence[Sequence[Document]]) -> list[Path]:
    folders = [folder / f"unit_{number}" for number in range(len(units))]
    for path, unit in zip(folders, units, strict=True):
        with AtomicFolder(path) as result:
            write_keys(result, [keys(unit[: len(unit) // 2]), keys(unit[len(unit) // 2 :])])
            result.commit("", {})
    return folders


def alike(one: Document, other: Document) -> bool:
    bands = zip(one[1] or (), other[1] or (), strict=False)
    return one[0] == other[0] or any(own == its for own, its in bands)


def naive(units: Sequence[Sequence[Document]]) -> list[tuple[int, int, bool, int, int]]:
    """(unit, row, is exact, first unit, first row) of what goes."""
    places = [(unit, row) for unit, rows in enumerate(units) for row in range(len(rows))]
    cluster = {place: place for place in places}
    for one in places:
        for other in places:
            if alike(units[one[0]][one[1]], units[other[0]][other[1]]):
                low, high = sorted((cluster[one], cluster[other]))
                cluster = {place: low if root == high else root for place, root in cluster.items()}
    seen: set[int] = set()
    gone = []
    for place in places:
        text = units[place[0]][place[1]][0]
        if cluster[place] != place:
            gone.append((*place, text in seen, *cluster[place]))
        seen.add(text)
    return gone


def found(duplicates: Duplicates, units: int) -> list[tuple[int, int, bool, int, int]]:
    return [(unit, *record.tolist()) for unit in range(units) for record in duplicates.removed(unit)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(documents, max_size=10), max_size=4), st.sampled_from([1 << 20, 512]))
def test_what_goes_is_what_a_comparison_of_all_finds(units: list[list[Document]], memory_bytes: int) -> None:
    with fast_folder() as folder:
        config = DeduplicateConfig(memory_bytes=memory_bytes)
        duplicates = find_duplicates(write_units(folder, units), folder, config, run_shuffled)
        expected = naive(units)
        assert found(duplicates, len(units)) == expected
        summary = duplicates.summary
        assert (summary.documents, summary.exact + summary.fuzzy) == (sum(map(len, units)), len(expected))
        assert summary.exact == sum(is_exact for _, _, is_exact, _, _ in expected)
        assert sum(summary.clusters.values()) == len({first for *_, first in [(p[:2], p[3:]) for p in expected]})
