"""How much of a document its most frequent n-gram is, and how much repeats n-grams that were there before.

Design choices:
- An n-gram is a 64-bit hash of its words' hashes, made for all n-grams of a batch from those a word shorter, by one
  multiplication and one addition.
- Counting goes document by document through a small hash table, in a loop that numba compiles: which repeats count
  depends on those found before, so it is no matter of whole arrays. The compiled loops are kept on disk where numba
  finds a place it may write to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.filters.ragged import Int64
from megatrain.data_prep.filters.words import Words
from megatrain.errors import InputError

Hashes = npt.NDArray[np.uint64]
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def ngrams(words: Words, longest: int) -> Iterator[Hashes]:
    """The hashes of n-grams for n = 1 to `longest`: uint64[words], by their first word. Those at a document's last
    n-1 words are of no use: they reach into the next."""
    hashes = words.hashes
    grams = hashes.copy()
    yield grams
    for n in range(2, longest + 1):
        grams = grams * FACTOR
        grams[: max(0, len(grams) - n + 1)] += hashes[n - 1 :]
        yield grams


def top_characters(words: Words, grams: Hashes, n: int) -> Int64:
    """Characters of all occurrences of the most frequent n-gram, with the spaces between its words; int64[documents].
    Of several equally frequent it is the one that comes first."""
    return _count(_top, words, grams, n)


def repeated_characters(words: Words, grams: Hashes, n: int) -> Int64:
    """Characters of n-grams that were there before; after one the search goes on behind it; int64[documents]."""
    return _count(_repeated, words, grams, n)


def _count(loop: Callable[..., None], words: Words, grams: Hashes, n: int) -> Int64:
    found = np.zeros(len(words.rows.counts), np.int64)
    most = int(words.rows.counts.max(initial=1))
    ends = np.zeros(len(words.lengths) + 1, np.int64)
    np.cumsum(words.lengths, out=ends[1:])
    _compiled(loop)(grams, words.rows.offsets, ends, n, np.zeros(2 << most.bit_length(), np.uint64), found)
    return found


@cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    try:
        import numba
    except ImportError:
        raise InputError("filters.gopher_repetition: numba is missing: pip install 'megatrain[prep]'") from None
    try:
        compiled: Callable[..., None] = numba.njit(cache=True)(loop)
    except RuntimeError:  # It may write neither beside this file nor in the home folder.
        compiled = numba.njit(loop)
    return compiled


def _top(grams: Hashes, offsets: Int64, ends: Int64, n: int, table: Hashes, found: Int64) -> None:
    counts = np.zeros(len(table), np.int32)
    order = np.zeros(len(table), np.int64)
    firsts = np.zeros(len(table), np.int64)
    for document in range(len(offsets) - 1):
        begin, stop = offsets[document], offsets[document + 1] - n + 1
        size = 1
        while size < 2 * (stop - begin):
            size *= 2
        different = 0
        for word in range(begin, stop):
            gram = grams[word]
            slot = np.int64((gram ^ (gram >> np.uint64(32))) & np.uint64(size - 1))
            while counts[slot] > 0 and table[slot] != gram:
                slot = (slot + 1) & (size - 1)
            if counts[slot] == 0:
                table[slot], firsts[slot], order[different] = gram, word, slot
                different += 1
            counts[slot] += 1
        best = 0
        for place in range(different):
            slot = order[place]
            if counts[slot] > best:
                best, word = counts[slot], firsts[slot]
                found[document] = best * (ends[word + n] - ends[word] + n - 1)
            counts[slot] = 0


def _repeated(grams: Hashes, offsets: Int64, ends: Int64, n: int, table: Hashes, found: Int64) -> None:
    owners = np.zeros(len(table), np.int32)
    for document in range(len(offsets) - 1):
        word, stop = offsets[document], offsets[document + 1] - n + 1
        size = 1
        while size < 2 * (stop - word):
            size *= 2
        while word < stop:
            gram = grams[word]
            slot = np.int64((gram ^ (gram >> np.uint64(32))) & np.uint64(size - 1))
            while owners[slot] == document + 1 and table[slot] != gram:
                slot = (slot + 1) & (size - 1)
            if owners[slot] == document + 1:
                found[document] += ends[word + n] - ends[word]
                word += n
            else:
                table[slot], owners[slot] = gram, document + 1
                word += 1
