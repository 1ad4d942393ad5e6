"""What goes and what stays, against a comparison of every document with every other, in any order of tasks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.deduplicate.clusters import REMOVED, SUMMARY
from megatrain.data_prep.deduplicate.config import DeduplicateConfig, FuzzyConfig
from megatrain.data_prep.deduplicate.duplicates import Duplicates, find_duplicates
from megatrain.data_prep.deduplicate.exchange import PLAN
from megatrain.data_prep.deduplicate.keys import KEYS, Keys, document_keys, write_keys
from megatrain.data_prep.files import AtomicFolder
from megatrain.errors import GaveUp
from tests.data_prep.deduplicate.common import documents as documents_of
from tests.data_prep.deduplicate.common import fast_folder, run, run_shuffled

RESULTS = (REMOVED, SUMMARY)
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


def test_a_second_start_does_nothing_again(tmp_path: Path) -> None:
    folders = write_units(tmp_path, [[(1, (1, 1)), (1, (2, 2))], [(2, (2, 3))]])
    config = DeduplicateConfig()
    first = find_duplicates(folders, tmp_path, config, run)
    left = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.name != PLAN}
    again = find_duplicates(folders, tmp_path, config, run)
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir() if path.name != PLAN} == left
    assert {path.name for path in left} == {"pairs_000_000000", "pairs_001_000000", "pairs_002_000000", *RESULTS}
    assert find_duplicates(folders[:1], tmp_path, config, run).folder != first.folder


def test_examples_and_clusters_are_in_the_summary(tmp_path: Path) -> None:
    same: list[Document] = [(0, None)] * 5
    folders = write_units(tmp_path, [same, [(1, (1, 1)), (2, (1, 2)), (3, (3, 2))]])
    summary = find_duplicates(folders, tmp_path, DeduplicateConfig(), run).summary
    assert (summary.documents, summary.exact, summary.fuzzy) == (8, 4, 2)
    assert summary.clusters == {"3-4": 1, "5-8": 1}
    assert sorted((pair.unit, pair.row, pair.first_unit, pair.first_row) for pair in summary.exact_examples) == [
        (0, row, 0, 0) for row in range(1, 5)
    ]
    (fuzzy,) = summary.fuzzy_examples  # the last one is like this one only, not like the first
    assert (fuzzy.unit, fuzzy.row, fuzzy.first_unit, fuzzy.first_row) == (1, 1, 1, 0)


def test_texts_are_the_same_but_for_white_space_and_normal_form() -> None:
    texts = ["caf\u00e9 au  lait\n", " cafe\u0301\tau lait", "Caf\u00e9 au lait", "caf\u00e9 au lait!"]
    found = document_keys(documents_of(texts), DeduplicateConfig(exact=True))
    assert len({tuple(key) for key in found.text.tolist()}) == 3
    assert (found.text[0] == found.text[1]).all()
    assert found.bands.shape == (4, 0)


def test_sources_can_be_kept_apart() -> None:
    batch = documents_of(["a text"] * 4, ["one", "two", "one", None])
    config = DeduplicateConfig(exact=True, fuzzy=FuzzyConfig(enabled=True), across_sources=False)
    for keys_of in (document_keys(batch, config).text, document_keys(batch, config).bands):
        assert [(keys_of[0] == other).all() for other in keys_of] == [True, False, True, False]


@pytest.mark.parametrize("damage", [b"", b"12345678", None])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, damage: bytes | None) -> None:
    (folder,) = write_units(tmp_path, [[(1, (1, 1)), (1, (2, 2))]])
    path = folder / KEYS
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    with pytest.raises(GaveUp, match=f"^{path}: can't be read: "):
        find_duplicates([folder], tmp_path, DeduplicateConfig(), run)


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_are_not_whole_are_named(tmp_path: Path, name: str) -> None:
    folders = write_units(tmp_path, [[(1, None)]])
    duplicates = find_duplicates(folders, tmp_path, DeduplicateConfig(), run)
    (duplicates.folder / name).write_bytes(b"12345678")
    with pytest.raises(GaveUp, match=f"^{duplicates.folder / name}: can't be read: "):
        Duplicates(duplicates.folder)


def test_no_units_are_no_duplicates(tmp_path: Path) -> None:
    assert find_duplicates([], tmp_path, DeduplicateConfig(), run).summary.documents == 0


MEASURED = """
import re, sys
from pathlib import Path
from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.duplicates import find_duplicates

folder = Path(sys.argv[1])
units, config = sorted(folder.glob("unit_*")), DeduplicateConfig(memory_bytes=64 << 20)
found = find_duplicates(units, folder, config, lambda function, tasks: list(map(function, tasks)))
most = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss begins at the parent's
print(found.summary.exact + found.summary.fuzzy, 1024 * int(most[1]))
"""
"""A program that finds duplicates in one process, and prints how many there are and its largest memory, bytes."""


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_memory_is_bounded(tmp_path: Path, count: int) -> None:
    """A tenth of the documents are like an earlier one, in one band."""
    generator = np.random.default_rng(0)
    bands = generator.integers(0, 2**64, (count, 14), np.uint64)
    later = np.arange(count - count // 10, count)
    bands[later, later % 14] = bands[later - later[0], later % 14]
    for unit, part in enumerate(np.array_split(bands, 10)):
        with AtomicFolder(tmp_path / f"unit_{unit}") as result:
            write_keys(result, [Keys(part[:, :0], part, np.ones(len(part), np.bool_))])
            result.commit("", {})
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found, memory = map(int, ended.stdout.split())
    assert found == count // 10
    assert memory < 250e6
