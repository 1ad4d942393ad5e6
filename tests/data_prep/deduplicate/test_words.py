"""Words and their n-grams, against a plain walk through the characters."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.deduplicate import words as module
from megatrain.data_prep.deduplicate.words import alone_share, ngrams, places, words

alphabet = "abC é É1\uff12,.\n 漢字かなไ한국 ́'\u00df\U00020000\U0001f600"
texts = st.text(alphabet, max_size=30)


def is_alone(character: str) -> bool:
    low = ord(character)
    return any(first <= low <= last for first, last in module.NOT_SPACED) and unicodedata.category(character)[0] in "LM"


def naive_spans(text: str) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    joins = False
    for place, character in enumerate(text):
        if unicodedata.category(character)[0] not in "LMN":
            joins = False
        elif joins and not is_alone(character):
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
            joins = not is_alone(character)
    return spans


def folded(word: str) -> str:
    bare = "".join(
        unicodedata.normalize("NFD", c)[0] if c in "éÉ" else "0" if unicodedata.category(c) == "Nd" else c for c in word
    )
    return bare.lower()


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, max_size=4))
def test_words_are_told_apart_by_what_they_are(found: list[str]) -> None:
    hashes, starts = words(found)
    expected = [folded(text[begin:end]) for text in found for begin, end in naive_spans(text)]
    assert np.diff(starts).tolist() == [len(naive_spans(text)) for text in found]
    by_word: dict[str, int] = {}
    for word, value in zip(expected, hashes.tolist(), strict=True):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)
    for text in found:
        assert list(zip(*(array.tolist() for array in places(text)), strict=True)) == naive_spans(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=4), st.integers(1, 5), st.integers(1, 7))
def test_ngrams_are_those_of_a_walk(found: list[list[int]], length: int, at_once: int) -> None:
    hashes = np.array([word for text in found for word in text], np.uint64) + np.uint64(10)
    starts = np.concatenate([[0], np.cumsum([len(text) for text in found], dtype=np.int64)]).astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORDS_AT_ONCE", at_once)
        grams, first = ngrams(hashes, starts, length)
    expected = [
        [tuple(text[at : at + length]) for at in range(max(1, len(text) - length + 1))] if text else []
        for text in found
    ]
    assert np.diff(first).tolist() == [len(text) for text in expected]
    pairs = dict(zip([gram for text in expected for gram in text], grams.tolist(), strict=False))
    assert [pairs[gram] for text in expected for gram in text] == grams.tolist()
    assert len(set(pairs.values())) == len(pairs)


def test_a_long_text_is_cut_where_it_says() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHARACTERS_AT_ONCE", 10)
        hashes, starts = words(["one two three four five", "three"])
        begins, ends = places("one two three four five")
    assert starts.tolist() == [0, 7, 8]
    assert hashes[7] not in hashes[:7], "three lies across a cut, and counts as two words"
    assert begins.tolist() == [0, 4, 8, 10, 14, 19, 20]
    assert ends.tolist() == [3, 7, 10, 13, 18, 20, 23]


@pytest.mark.parametrize(("text", "share"), [("", 0), ("one two", 0), ("漢字", 1), ("漢字 one two", 0.5)])
def test_the_share_of_characters_that_are_words(text: str, share: float) -> None:
    assert alone_share(text) == share
