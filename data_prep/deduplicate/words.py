"""The words of texts as hashes, and the hashes of their n-grams: arrays over all texts of a batch, no loop over words.

Design choices:
- A word is a run of letters, marks and digits, in lower case and without the diacritics that a single code point
  carries; all digits are one, so dates and page numbers don't tell documents apart. Everything else only separates.
- A character of a script that is written without spaces (Chinese, Japanese, Thai, ...) is a word by itself.
- A word's hash is a polynomial in its characters' random values, modulo 2**64: with the powers of an odd base in a
  table it is a product and a sum over a slice, whatever the length. Two words are alike by chance at about 2**-64.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

CHARACTERS_AT_ONCE = 1 << 18
"""Of the texts that are hashed together: what the arrays of a step take stays in the processor's cache."""
WORDS_AT_ONCE = 1 << 16
"""The same of n-grams."""

BASE = 0x9E3779B97F4A7C15
"""Of the polynomials; odd, so that it has an inverse."""
NOT_SPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, further extensions
)
"""Ranges of code points, ends included, whose letters are words by themselves."""

SEPARATES, JOINS, ALONE = 0, 1, 2
"""What a code point is: no part of a word, a part of one, a word by itself."""


def mix(values: UInt64) -> UInt64:
    """A bijection of 64-bit values that leaves no pattern (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def words(texts: Sequence[str]) -> tuple[UInt64, Int64]:
    """The hashes of all words, in order, uint64[words]; where each text's begin, int64[texts + 1].

    A text is cut every CHARACTERS_AT_ONCE characters, and a word that lies there counts as two.
    """
    cuts = [range(0, len(text), CHARACTERS_AT_ONCE) for text in texts]
    pieces = [text[at : at + CHARACTERS_AT_ONCE] for text, cut in zip(texts, cuts, strict=True) for at in cut]
    hashes: list[UInt64] = []
    counts: list[Int64] = []
    waiting: list[str] = []
    size = 0
    for number, piece in enumerate(pieces):
        waiting.append(piece)
        size += len(piece)
        if number + 1 == len(pieces) or size + len(pieces[number + 1]) > CHARACTERS_AT_ONCE:
            found, count = _words(waiting)
            hashes.append(found)
            counts.append(count)
            waiting, size = [], 0
    by_piece = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
    starts = by_piece[np.concatenate([np.zeros(1, np.int64), np.cumsum([len(cut) for cut in cuts], dtype=np.int64)])]
    return np.concatenate([np.zeros(0, np.uint64), *hashes]), starts


def alone_share(text: str) -> float:
    """The share, of the words of a text, of characters that are words by themselves."""
    kind, begin = _begins(_points(text))
    return float((kind == ALONE).sum()) / max(1, len(begin))


def ngrams(hashes: UInt64, starts: Int64, length: int) -> tuple[UInt64, Int64]:
    """The hashes of the n-grams of each text, and where each text's begin; `hashes` and `starts` as `words` gives them.

    A text with fewer words than `length` has one n-gram, of all its words; one without words has none.
    """
    counts = np.diff(starts)
    found = np.zeros(len(starts), np.int64)
    np.cumsum(np.where(counts > 0, np.maximum(counts - length + 1, 1), 0), out=found[1:])
    combined = [np.zeros(0, np.uint64)]
    for first in range(0, len(hashes), WORDS_AT_ONCE):
        place = np.arange(first, min(first + WORDS_AT_ONCE, len(hashes)))
        text = np.searchsorted(starts, place, side="right")
        end = starts[text]
        grams = hashes[place]
        for further in range(1, length):
            following = hashes[np.minimum(place + further, len(hashes) - 1)]
            following[place + further >= end] = 0
            grams = (grams ^ (grams >> np.uint64(29))) * np.uint64(BASE) + following
        combined.append(mix(grams[(place + length <= end) | (place == starts[text - 1])]))
    return np.concatenate(combined), found


def places(text: str) -> tuple[Int64, Int64]:
    """Where the words of a text begin, and where they end: int64[words], characters."""
    found = [np.zeros((2, 0), np.int64)]
    for first in range(0, len(text), CHARACTERS_AT_ONCE):
        kind, begin = _begins(_points(text[first : first + CHARACTERS_AT_ONCE]))
        inside = np.flatnonzero(kind != SEPARATES)
        before = np.searchsorted(inside, [*begin[1:], len(kind)][: len(begin)])  # where the next word begins
        found.append(first + np.stack([begin, inside[before - 1] + 1]))
    begins, ends = np.concatenate(found, 1)
    return begins, ends


def _words(texts: Sequence[str]) -> tuple[UInt64, Int64]:
    """The hashes of the words of few texts, and how many each has."""
    points = _points("\n".join([*texts, ""]))
    _, begin = _begins(points)
    counts = np.diff(np.searchsorted(begin, np.cumsum([len(text) + 1 for text in texts])), prepend=0)
    if not len(begin):
        return np.zeros(0, np.uint64), counts
    powers, inverse = _powers()
    sums = np.add.reduceat(_table()[1][points] * powers[: len(points)], begin)
    return mix(sums * inverse[begin]), counts


def _points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _begins(points: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint8], Int64]:
    """What each code point is, and where words begin."""
    kind = _table()[0][points]
    begins = kind != SEPARATES
    begins[1:] &= (kind[:-1] != JOINS) | (kind[1:] == ALONE)
    return kind, np.flatnonzero(begins)


@cache
def _table() -> tuple[npt.NDArray[np.uint8], UInt64]:
    """Of each code point: SEPARATES, JOINS or ALONE; and the value that it has in a word, 0 where it separates."""
    kinds = np.zeros(0x110000, np.uint8)
    folded = np.arange(0x110000, dtype=np.uint64)
    for point in range(0x20000):
        character = chr(point)
        category = unicodedata.category(character)
        if category[0] in "LMN":
            kinds[point] = JOINS
            folded[point] = ord("0") if category == "Nd" else _fold(character)
    for low, high in NOT_SPACED:
        inside = kinds[low : high + 1]
        inside[inside == JOINS if high < 0x20000 else slice(None)] = ALONE
    values = mix(folded + np.uint64(1))
    values[kinds == SEPARATES] = 0
    return kinds, values


def _fold(character: str) -> int:
    """The code point of the lower-case letter without its diacritics; itself where these aren't one code point."""
    lower = character.lower()
    bare = [part for part in unicodedata.normalize("NFD", lower) if unicodedata.category(part) != "Mn"]
    return ord(bare[0]) if len(bare) == 1 else ord(lower[0])


@cache
def _powers() -> tuple[UInt64, UInt64]:
    """The powers of BASE modulo 2**64, from 0 on, and of its inverse; for all that is hashed together."""
    tables = []
    for base in (BASE, pow(BASE, -1, 2**64)):
        powers = np.full(2 * CHARACTERS_AT_ONCE + 1, base, np.uint64)
        powers[0] = 1
        tables.append(np.cumprod(powers, dtype=np.uint64))
    return tables[0], tables[1]
