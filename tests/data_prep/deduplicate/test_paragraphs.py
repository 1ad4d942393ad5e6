"""Lines that an earlier document has: against a walk through all documents in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.deduplicate.config import DeduplicateConfig, ParagraphsConfig
from megatrain.data_prep.deduplicate.duplicates import find_duplicates
from megatrain.data_prep.deduplicate.keys import document_keys, write_keys
from megatrain.data_prep.deduplicate.paragraphs import LINES, find_paragraphs, line_keys, write_line_keys
from megatrain.data_prep.deduplicate.steps import RemovedDocuments, RepeatedLines
from megatrain.data_prep.files import AtomicFolder
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.step import Step
from megatrain.errors import GaveUp
from tests.data_prep.deduplicate.common import documents, fast_folder, run_shuffled

Unit = Sequence[str]

texts = st.lists(st.sampled_from(["aaaa", "b  b", "b b", "cccc", "dddd eeee", "x", ""]), max_size=5).map("\n".join)


def config_of(least: int = 3, left: int = 1, memory_bytes: int = 1 << 20) -> DeduplicateConfig:
    return DeduplicateConfig(exact=True, paragraphs=ParagraphsConfig(True, least, left), memory_bytes=memory_bytes)


def deduplicated(folder: Path, units: Sequence[Unit], config: DeduplicateConfig) -> tuple[list[list[str]], Notes]:
    """What stays of each unit, through files."""
    folders = [folder / f"unit_{number}" for number in range(len(units))]
    for path, unit in zip(folders, units, strict=True):
        batches = [documents(unit[:2]), documents(unit[2:])]
        with AtomicFolder(path) as result:
            write_keys(result, [document_keys(batch, config) for batch in batches])
            write_line_keys(result, [line_keys(batch, config) for batch in batches])
            result.commit("", {})
    duplicates = find_duplicates(folders, folder, config, run_shuffled)
    repeated = find_paragraphs(folders, folder, config, run_shuffled, duplicates)
    notes = Notes()
    kept: list[list[str]] = []
    for number, unit in enumerate(units):
        steps: list[Step] = [RemovedDocuments(duplicates, number), RepeatedLines(repeated, duplicates, number, config)]
        kept.append([])
        for batch in (documents(unit[:2]), documents(unit[2:])):
            for step in steps:
                batch = step(batch, notes)
            kept[-1] += batch.texts
    return kept, notes


def naive(units: Sequence[Unit], least: int, left: int) -> list[list[str]]:
    seen: set[str] = set()
    lines_seen: set[str] = set()
    kept: list[list[str]] = []
    for unit in units:
        kept.append([])
        for text in unit:
            same = " ".join(text.split())
            if same in seen:
                continue
            seen.add(same)
            own = {" ".join(line.split()) for line in text.split("\n")}
            repeated = {line for line in own & lines_seen if len(line) >= least}
            lines_seen |= own
            rest = "\n".join(line for line in text.split("\n") if " ".join(line.split()) not in repeated)
            if not repeated or len(rest.strip()) >= left:
                kept[-1].append(rest)
    return kept


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(texts, max_size=5), max_size=4), st.sampled_from([1 << 20, 256]), st.integers(0, 3))
def test_lines_stay_where_they_are_first(units: list[list[str]], memory_bytes: int, left: int) -> None:
    with fast_folder() as folder:
        kept, _ = deduplicated(folder, units, config_of(left=left, memory_bytes=memory_bytes))
        assert kept == naive(units, 3, left)


@pytest.mark.parametrize("size", [0, 7, 16])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / LINES).write_bytes(bytes(size))
    with pytest.raises(GaveUp, match=f"^{tmp_path / LINES}: can't be read: "):
        find_paragraphs([tmp_path], tmp_path, config_of(), run_shuffled, None)


def test_documents_need_not_be_compared(tmp_path: Path) -> None:
    config = config_of()
    with AtomicFolder(tmp_path / "unit") as result:
        write_line_keys(result, [line_keys(documents(["a line", "a line"]), config)])
        result.commit("", {})
    repeated = find_paragraphs([tmp_path / "unit"], tmp_path, config, run_shuffled, None)
    kept = RepeatedLines(repeated, None, 0, config)(documents(["a line", "a line"]), Notes())
    assert kept.texts == ["a line"]


def test_what_happened_is_noted(tmp_path: Path) -> None:
    long, other = "the same long line", "and what else there is to say"
    units = [[long, long, f"{long}\n{other}"], [f"{long}\n{other}!", f"short\n{long}"]]
    kept, notes = deduplicated(tmp_path, units, config_of(10, 10))
    assert kept == [[long, other], [f"{other}!"]]
    assert notes.entered == {"duplicates": 5, "paragraphs": 4}
    (exact,) = notes.dropped["duplicates"]["exact"].examples
    assert (exact.id, exact.text, exact.value) == ("1", long, "document 0 of unit 0 stays")
    little = notes.dropped["paragraphs"]["little_left"]
    assert (little.documents, little.examples[0].value) == (1, f"1 of 2 lines, the first: {long}")
    assert notes.changed["paragraphs"]["repeated_lines"].documents == 2
