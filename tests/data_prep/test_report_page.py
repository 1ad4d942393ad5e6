from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data_prep.report import Report
from megatrain.data_prep.report_page import MOST_ROWS, duration, lengths, page, pair, share, size, steps, table

HOSTILE = "</div></li></details></style><script>alert(1)</script><img src=//evil.example/x onerror='alert(2)'>\"&amp;"
VOID = {"meta"}

EMPTY = Report().to_json()


class Reader(HTMLParser):
    """The elements of a page with their attributes, what is written in it, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def rows(self) -> str:
        """The text, a space between any two words."""
        return " ".join(self.text.split())


def tally(documents: int, name: str, examples: int = 1) -> dict[str, Any]:
    """Documents of a reason, 1000 bytes each, and examples of them."""
    found = [
        {"order": n, "id": f"{name}:{n}", "text": f"text of {name}:{n}", "value": f"value {n}"} for n in range(examples)
    ]
    return {"documents": documents, "bytes": 1000 * documents, "examples": found}


def amount(split: str, source: str | None, language: str | None, tokens: int, documents: int = 1) -> dict[str, Any]:
    counts = {"documents": documents, "bytes": 4 * tokens, "characters": 3 * tokens, "words": tokens // 2}
    return {"split": split, "source": source, "language": language, **counts, "tokens": tokens}


def full(name: str) -> dict[str, Any]:
    """A report with everything in it; all that comes from outside is `name`."""
    kinds = {"examples": [{"kind": "fuzzy", "kept": name, "dropped": name, "kept_text": name, "dropped_text": name}]}
    return EMPTY | {
        "exit_code": 3,
        "reason": name,
        "files": 4,
        "failed_units": {name: name},
        "broken_files": {name: name},
        "problems": {name: {name: 5}, "other": {name: 2}},
        "first_problem": {name: name},
        "records": 1000,
        "documents": {"train": 590, "held_out": 10},
        "tokens": {"train": 59_000, "held_out": 1_000},
        "text_bytes": 240_000,
        "sources_and_languages": [amount("train", name, name, 60_000, 600)],
        "documents_by_log2_tokens": [0] * 6 + [400, 200] + [0] * 24,
        "steps": {
            "entered": {name: 1000, "filter": 900},
            "dropped": {name: {name: tally(100, name)}, "filter": {"short": tally(50, name), "long": tally(250, name)}},
            "changed": {name: {name: tally(7, name)}},
        },
        "backend": name,
        "backend_reason": name,
        "ids_compared": {"documents": 12, "different": 1},
        "seconds": 2.0,
        "duplicates": {"exact": 3, "fuzzy": 4, "cluster_sizes": {"2": 1, "3-4": 2}} | kinds,
    }


def test_texts_from_outside_stay_text() -> None:
    harmless, hostile = Reader(page(full("harmless"))), Reader(page(full(HOSTILE)))
    assert hostile.elements == harmless.elements
    assert hostile.text.count(HOSTILE) == harmless.text.count("harmless") > 25
    assert not hostile.open


def test_the_page_needs_no_other_file_and_runs_nothing() -> None:
    written = page(full(HOSTILE))
    elements = Reader(written).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not [found for _, found in elements if "src" in found or any(name.startswith("on") for name in found)]
    links = [str(found["href"]) for _, found in elements if "href" in found]
    assert sorted(links) == sorted("#" + str(found["id"]) for _, found in elements if "id" in found)
    assert len(links) == 4
    style = written[written.index("<style>") : written.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(found["content"] for _, found in elements if "http-equiv" in found)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")


def test_every_reason_and_every_example_is_there() -> None:
    report = EMPTY | {"records": 500, "steps": {"entered": {}, "dropped": {}, "changed": {}}}
    for kind in ("dropped", "changed"):
        for step in ("unicode", "gopher", "c4"):
            names = {
                f"{kind} {step} {number}": tally(20, f"{kind}/{step}/{number}", examples=20) for number in range(4)
            }
            report["steps"][kind][step] = names
    read = Reader(page(json.loads(json.dumps(report))))
    for kind in ("dropped", "changed"):
        for name, tallied in ((n, t) for step in report["steps"][kind].values() for n, t in step.items()):
            assert read.words.count(name) == 2  # in the table, and above its examples
            for example in tallied["examples"]:
                assert read.words.count(example["id"]) == 1
                assert read.words.count(example["text"]) == 1
    assert read.words.count("value 19") == 24


def test_the_figures_of_the_funnel() -> None:
    text = Reader(page(full("NAME"))).rows()
    assert "Incomplete (exit code 3): NAME" in text
    assert "Documents kept 600 of 1,000 read, 60.0%; 10 held out" in text
    assert "Tokens 60,000 1,000 held out" in text
    assert "Text kept 240.0 kB 4.00 bytes a token" in text
    assert "Time 2.0 s 120.0 kB/s of text kept" in text
    assert "12 documents compared with Hugging Face's ids: 1 differ" in text
    assert "NAME 1,000 100 10.0% 100.0 kB" in text
    assert "NAME 7 0.7% 7.0 kB" in text
    assert "filter 900 300 33.3% 300.0 kB long 250 27.8% 250.0 kB short 50 5.6% 50.0 kB in the set 600 240.0 kB" in text
    assert "NAME 7 2 NAME" in text  # bad records, files, the first
    assert "3 documents were the same as an earlier one, 4 almost the same." in text
    assert "NAME 600 60,000 100.0% 240.0 kB 4.00 3.00 2.00" in text
    assert "64 to 127 400 128 to 255 200" in text


def test_a_report_of_nothing_is_a_page() -> None:
    text = Reader(page(EMPTY)).rows()
    assert "Done (exit code 0)" in text
    assert "Documents kept 0 of 0 read; 0 held out" in text
    assert "Problems" not in text
    assert "Duplicates" not in text
    assert "Examples" not in text


def test_control_characters_and_names_that_are_no_unicode_are_seen() -> None:
    report = EMPTY | {"broken_files": {"a\0b\x1b[2Jc\udcffd.txt": "first\r\nsecond\x85"}}
    written = page(report)
    assert "a\ufffdb\ufffd[2Jc\ufffdd.txt" in written
    assert "first\nsecond\ufffd" in written
    written.encode()


def test_long_tables_are_cut_and_say_so() -> None:
    files = {f"file-{number:04d}": "broken" for number in range(MOST_ROWS + 7)}
    sources = [amount("train", f"source-{number:04d}", None, 2 * (number + 1)) for number in range(MOST_ROWS + 1234)]
    report = full("name") | {"broken_files": files, "sources_and_languages": sources}
    report["steps"]["dropped"]["filter"] = {f"reason {number}": tally(1, "", examples=0) for number in range(100)}
    written = page(report)
    text = Reader(written).rows()
    assert f"file-{MOST_ROWS - 1:04d} broken and 7 more, in report.json" in text
    assert "source-1283" in text
    assert "source-1233" not in text
    assert "and 1,234 more, in report.json" in text
    assert len(written.encode()) < 200_000


def test_a_step_that_only_changes_has_its_place_and_no_shares_of_what_wasn_t_counted() -> None:
    notes = {
        "entered": {"b": 10},
        "dropped": {"b": {"x": tally(1, "x"), "y": tally(4, "y")}},
        "changed": {"a": {"z": tally(2, "z")}},
    }
    found = steps(notes)
    assert [(step.name, step.given, step.documents, step.share) for step in found] == [
        ("b", 10, 5, 0.5),
        ("a", None, 0, None),
    ]
    assert [(reason.name, reason.share) for reason in found[0].dropped] == [("y", 0.4), ("x", 0.1)]
    assert [(reason.name, reason.share) for reason in found[1].changed] == [("z", None)]


def test_amounts_are_summed_over_splits() -> None:
    amounts = [
        amount("train", "a", "en", 6),
        amount("held_out", "a", "en", 2),
        amount("train", None, "de", 32, documents=5),
    ]
    found = table(amounts, "source")
    assert [(row.name, row.amount["documents"], row.amount["tokens"], row.share) for row in found.rows] == [
        ("not named", 5, 32, 0.8),
        ("a", 2, 8, 0.2),
    ]
    assert (found.total["tokens"], found.more) == (40, 0)
    assert [row.name for row in table(amounts, "language").rows] == ["de", "en"]


def test_lengths_leave_out_what_is_empty_at_both_ends() -> None:
    assert lengths([0, 0, 5, 0, 7, 0, 0]) == [(4, 7, 5), (8, 15, 0), (16, 31, 7)]
    assert lengths([3, 0]) == [(1, 1, 3)]
    assert lengths([0] * 32) == []


def test_differences_of_a_pair_are_words_and_characters_of_scripts_without_spaces() -> None:
    found = pair("fuzzy", "a", "b", "one big cat\n这是一本书", "one fat cat\n那是一本书")
    assert [text for text, same in found.kept_text if not same] == ["big", "这"]
    assert [text for text, same in found.dropped_text if not same] == ["fat", "那"]


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_pair_keeps_both_texts_whole(kept: str, dropped: str) -> None:
    found = pair("exact", "a", "b", kept, dropped)
    assert "".join(text for text, _ in found.kept_text) == kept
    assert "".join(text for text, _ in found.dropped_text) == dropped
    assert [text for text, same in found.kept_text if same] == [text for text, same in found.dropped_text if same]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (0.0, "0.0%"), (0.0004, "< 0.1%"), (0.0005, "0.1%"), (0.26049, "26.0%"), (1.0, "100.0%")],
)
def test_shares(value: float | None, shown: str) -> None:
    assert share(value) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5.6e15, "5,600.0 TB")]
)
def test_sizes(number: float, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (61.2, "1 min 1 s"), (90_000, "25 h 0 min")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
