"""Documents with evaluation texts are found, and named; others aren't."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatrain.data_prep.notes import Notes
from megatrain.data_prep.screening.config import Contaminated, DecontaminateConfig
from megatrain.data_prep.screening.decontaminate import Decontaminate
from megatrain.data_prep.screening.index import Index, build_index
from megatrain.errors import GaveUp, InputError
from tests.data_prep.deduplicate.common import documents

QUESTION = "Which of the following animals lays eggs and also feeds its young with milk after they hatch?"
SHORT = "the platypus of eastern Australia lays two eggs"
CHINESE = "下列哪一种动物既产卵又在幼崽孵化之后用乳汁哺育它们的后代请从四个选项中选择"


def words(count: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=6)) for _ in range(count))


@pytest.fixture
def config(tmp_path: Path) -> DecontaminateConfig:
    record = {"question": QUESTION, "choices": [SHORT, "in the kitchen"], "id": words(20, 99)}
    (tmp_path / "quiz.jsonl").write_text("\n" + json.dumps(record) + "\n")
    (tmp_path / "chinese.txt").write_text(f"{CHINESE}\n中华人民共和国国务院办公厅\n")
    return DecontaminateConfig([str(tmp_path / "quiz.jsonl"), str(tmp_path / "chinese.txt")])


def step(config: DecontaminateConfig, folder: Path) -> Decontaminate:
    return Decontaminate(config, build_index(config, folder))


def test_overlaps_are_found_and_named(config: DecontaminateConfig, tmp_path: Path) -> None:
    texts = [
        words(100, 0),
        f"{words(50, 1)}. {QUESTION.upper().replace(' ', '  ')} {words(50, 2)}",
        f"{words(50, 3)} WHICH of the following animals lays eggs... {words(9, 4)}",
        f"{words(9, 5)} {SHORT}, {words(9, 6)}",
        f"{words(9, 5)} {SHORT[:-4]}, {words(9, 6)} in the kitchen",
        f"前言。{CHINESE[:28]}。后记",
        "中华人民共和国国务院办公厅",
        "",
    ]
    notes = Notes()
    kept = step(config, tmp_path)(documents(texts), notes)
    assert kept.column("id") == ["0", "2", "4", "6", "7"]
    values = {example.id: example.value for example in notes.dropped["decontaminate"]["overlap"].examples}
    quiz, chinese = config.files
    assert values == {
        "1": f"{quiz}:2: {'  '.join(QUESTION.upper().split()[:13])}",
        "3": f"{quiz}:2: {SHORT}",
        "5": f"{chinese}:1: {CHINESE[:26]}",
    }


def test_spans_are_taken_out(config: DecontaminateConfig, tmp_path: Path) -> None:
    config.action, config.margin, config.max_spans = Contaminated.span, 10, 2
    before, after = words(30, 1), words(30, 2)
    texts = [f"{before} {QUESTION} {after} {QUESTION}", QUESTION, f"{before} {QUESTION} " * 3, before]
    notes = Notes()
    kept = step(config, tmp_path)(documents(texts), notes)
    assert kept.texts == [f"{before[:-9]}\n{after[8:-9]}", before]  # the question mark is no part of a word
    assert notes.changed["decontaminate"]["overlap_removed"].documents == 1
    assert notes.dropped["decontaminate"]["overlap"].documents == 2


def test_a_large_index_finds_all_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("\n".join(words(20, seed) for seed in range(2000)))
    config = DecontaminateConfig([str(tmp_path / "many.txt")])
    inside = [f"{words(7, 5000 + seed)} {words(20, seed)}" for seed in range(0, 2000, 10)]
    outside = [words(40, 9000 + seed) for seed in range(200)]
    kept = step(config, tmp_path)(documents(inside + outside), Notes())
    assert kept.column("id") == [str(number) for number in range(200, 400)]


def test_the_index_is_made_once(config: DecontaminateConfig, tmp_path: Path) -> None:
    path = build_index(config, tmp_path)
    made = (path / "hashes").stat().st_mtime_ns
    assert build_index(config, tmp_path) == path
    assert (path / "hashes").stat().st_mtime_ns == made
    config.ngram = 10
    assert build_index(config, tmp_path) != path
    (path / "hashes").write_bytes(b"123")
    with pytest.raises(GaveUp, match="can't be read"):
        Index(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "a .txt or a .jsonl file"),
        ("missing.txt", None, "can't be read: No such file"),
        ("a.jsonl", b'{"text": "x"', "line 1: "),
        ("a.jsonl", b"[1, 2]", "line 1: it isn't an object"),
        ("a.jsonl", b'{"text": 5}', "line 1: a text isn't a string"),
        ("a.jsonl", b'{"other": "nothing that is asked for is here"}', "holds no text of 8 words or more"),
        ("a.txt", b"\xff\xfe", "line 1: "),
        ("a.txt", b"too short\n", "holds no text of 8 words or more"),
    ],
)
def test_what_cannot_be_an_evaluation_set(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"^decontaminate.files={tmp_path / name}: .*{message}"):
        build_index(DecontaminateConfig([str(tmp_path / name)]), tmp_path)


def test_hashes_of_all_lengths_are_told_apart(config: DecontaminateConfig, tmp_path: Path) -> None:
    index = Index(build_index(config, tmp_path))
    assert index.lengths == [8, 13, 26]
    assert [len(index.find(np.zeros(1, np.uint64), length)[0]) for length in index.lengths] == [0, 0, 0]
