# ruff: noqa: RUF001
"""Cleaning: what each step changes, what it leaves alone, and what it notes."""

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pytest
from ftfy.badness import is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatrain.data_prep.clean.config import CleanConfig, LinesConfig, check
from megatrain.data_prep.clean.control import ControlCharacters
from megatrain.data_prep.clean.lines import Lines
from megatrain.data_prep.clean.mojibake import UnicodeRepair, has_mojibake
from megatrain.data_prep.clean.steps import cleaning
from megatrain.data_prep.documents import SCHEMA, Documents
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.step import Step
from megatrain.errors import InputError

SUSPECTS = "".join(map(chr, range(0x20, 0x180))) + "\n‘’“”†‡…€™ˆŒœŽžŸΒΓΞΟβ„−√≈∂∑ВГРСЂЃ茶ァ€⌐◊�"


def documents(*texts: str) -> Documents:
    count = len(texts)
    columns = [pa.array([str(n) for n in range(count)]), pa.array(texts, pa.large_string())]
    return Documents(pa.record_batch([*columns, *(pa.nulls(count, pa.string()) for _ in range(4))], schema=SCHEMA))


def after(step: Step, *texts: str) -> tuple[list[str], Notes]:
    notes = Notes()
    found = step(documents(*texts), notes).texts
    assert notes.entered == {step.name: len(texts)}
    return found, notes


def counts(notes: Notes, step: str) -> dict[str, int]:
    return {what: tally.documents for what, tally in notes.changed.get(step, {}).items()}


def test_charsets_are_repaired_line_by_line() -> None:
    good = "Schöne Grüße — “ça va?” 茶，ﬁ ½"
    bad = "schÃ¶n\nplain\nand itâ\x80\x99s"
    found, notes = after(UnicodeRepair(), good, bad, "ascii", "Ame\u0301lie")
    assert found == [good, "schön\nplain\nand it’s", "ascii", "Amélie"]
    assert counts(notes, "unicode") == {"mojibake": 1, "nfc": 1}
    (noted,) = notes.changed["unicode"]["mojibake"].examples
    assert (noted.id, noted.text) == ("1", bad)
    assert noted.value == f"{bad!r} became {found[1]!r}"


def test_a_text_without_changes_is_the_same_object() -> None:
    given_texts = documents("ascii", "茶 and “quotes”")
    for step in cleaning(CleanConfig()):
        assert step(given_texts, Notes()) is given_texts


@settings(max_examples=1000)
@given(st.text(st.sampled_from(SUSPECTS), max_size=12))
@example("\xe9 a\xc2 ")
@example("\u0413\u045e\u0412\u0402\u0412.x")
def test_the_test_for_mojibake_misses_none_that_ftfy_finds(text: str) -> None:
    assert has_mojibake(text) or not is_bad(text)


def test_marks_without_end_are_left_alone() -> None:
    zalgo = "a" + "\u0301\u0323" * 100_000
    found, notes = after(UnicodeRepair(), zalgo, "e" + "\u0301" * 20)
    assert found == [zalgo, "é" + "\u0301" * 19]
    assert counts(notes, "unicode") == {"nfc": 1}


def test_control_characters() -> None:
    texts = [
        "a\r\nb\rc\n\td\u2028e",
        "nul\0 bell\a \x1b[1;31mred\x1b[0m",
        "N\bNA\bA_\bme",
        "\ufeffBOM soft\u00adhyphen zero\u200bwidth",
        "नमस्\u200dते 👩\u200d🚀 می\u200cخواهم \u200fx",
        "plain",
    ]
    found, notes = after(ControlCharacters(invisible=True), *texts)
    assert found == [
        "a\nb\nc\n\td\ne",
        "nul bell red",
        "NAme",
        "BOM softhyphen zerowidth",
        texts[4],
        "plain",
    ]
    assert counts(notes, "control") == {"removed": 4}
    kept, _ = after(ControlCharacters(invisible=False), texts[3])
    assert kept == [texts[3]]


@given(st.lists(st.text(max_size=30), min_size=1))
def test_what_is_left_is_text(texts: list[str]) -> None:
    step = ControlCharacters(invisible=True)
    found, _ = after(step, *texts)
    for text in found:
        assert all(unicodedata.category(sign) != "Cc" or sign in "\n\t" for sign in text)
    assert after(step, *found)[0] == found


def test_documents_that_nothing_is_left_of_are_dropped() -> None:
    found, notes = after(ControlCharacters(invisible=True), "\0\0", "a", " \x07 ")
    assert found == ["a"]
    assert {what: tally.documents for what, tally in notes.dropped["control"].items()} == {"empty": 2}
    assert notes.dropped["control"]["empty"].examples[0].text in ("\0\0", " \x07 ")


def test_lines() -> None:
    config = LinesConfig(drop=["^Share on", "(?i)subscribe now$"], trailing_spaces=True, blank_lines=1)
    text = "Title  \n\n\n \n\nShare on X\nbody\t\nPlease Subscribe NOW\nsubscribe now or never\nShare on Y"
    found, notes = after(Lines(config), text, "one\n\ntwo", "Share on Z\n")
    assert found == ["Title\n\nbody\nsubscribe now or never\n", "one\n\ntwo"]
    assert counts(notes, "lines") == {"changed": 2}


def test_nothing_is_cleaned_unless_it_is_asked_for() -> None:
    assert cleaning(CleanConfig()) == []
    lines = LinesConfig(trailing_spaces=True, blank_lines=2)
    assert [step.name for step in cleaning(CleanConfig(True, True, True, lines))] == ["unicode", "control", "lines"]
    (found,), _ = after(Lines(lines), "a \n\n\n\n\nb\n\n\nc\n")
    assert found == "a\n\n\nb\n\n\nc\n"


def test_patterns_take_no_longer_on_hostile_lines() -> None:
    found, _ = after(Lines(LinesConfig(drop=["(a+)+$b", r"(x*)*\s*$z"])), "a" * 300_000 + "\n" + " " * 300_000 + "x")
    assert len(found[0]) == 600_002


def test_values_that_cant_be_had() -> None:
    with pytest.raises(InputError, match=r"^clean\.lines\.drop=\(: .*missing"):
        cleaning(CleanConfig(lines=LinesConfig(drop=["("])))
    with pytest.raises(InputError, match=r"^clean\.lines\.blank_lines=-1: at least 0, or null"):
        check(CleanConfig(lines=LinesConfig(blank_lines=-1)))
