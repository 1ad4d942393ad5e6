"""The words of documents, as integers.

Design choices:
- Text is cut at whitespace; what stands between (a piece) is looked up in a dictionary that the segmenter fills. Most
  pieces of a text were seen before, so the segmenter, by far the dearest part, sees few.
- What filters ask of a word (its length, whether it has a letter) is found out once for each different word. A batch
  is an array of word ids; statistics of its documents are sums over rows of arrays.
- The dictionary is of this process, bounded, and started anew when full. It changes how fast words are found, never
  which.
"""

from __future__ import annotations

import string
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data_prep.documents import Bools, Documents
from megatrain.data_prep.filters.languages import Language, languages_of
from megatrain.data_prep.filters.ragged import Int64, Rows
from megatrain.data_prep.filters.segment import Segmenter, segmenter

MOST_CHARACTERS = 6_000_000
"""Of all pieces in the dictionary, after which it is started anew: some 100 MB of memory."""
LONGEST_PIECE = 1000
"""Characters. A longer one is cut, for the segmenters' time grows with its square."""

LETTER, SYMBOL, PUNCTUATION, TERMINAL = 1, 2, 4, 8
"""Bits of a word: a letter is in it; it is all symbols; all punctuation by Unicode; it can end a sentence."""


@cache
def terminal_punctuation() -> frozenset[str]:
    """What ends a sentence in any script: Unicode's property Sentence_Terminal (UAX 29)."""
    import regex

    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return frozenset(regex.findall(r"\p{Sentence_Terminal}", every))


@cache
def symbols() -> frozenset[str]:
    """What doesn't make a word: the punctuation that CCNet removes (Wenzek et al. 2020), control characters, and what
    ends a sentence."""
    controls = map(chr, (*range(32), *range(127, 160)))
    others = "«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．：；？～"  # noqa: RUF001
    return frozenset((*string.punctuation, *others, *controls)) | terminal_punctuation()


class Vocabulary:
    """Pieces, the words they are made of, and what is known of each word."""

    def __init__(self) -> None:
        self.characters = 0
        self.words: dict[str, int] = {}
        self.lengths, self.bits, self.hashes = array("i"), array("B"), array("Q")
        self.starts, self.parts = array("q", [0]), array("i")
        self.tables: dict[str, Pieces] = {}

    def table(self, words: str) -> Pieces:
        """The pieces of languages whose words are found so."""
        if words not in self.tables:
            self.tables[words] = Pieces(self, _segmenter(words))
        return self.tables[words]

    def add_piece(self, words: Iterable[str]) -> int:
        """The number of a new piece."""
        self.parts.extend(map(self._word, words))
        self.starts.append(len(self.parts))
        return len(self.starts) - 2

    def _word(self, word: str) -> int:
        known = self.words.get(word)
        if known is None:
            known = self.words[word] = len(self.words)
            self.lengths.append(len(word))
            self.bits.append(_bits(word))
            self.hashes.append(xxhash.xxh3_64_intdigest(word.encode()))
        return known


class Pieces(dict[str, int]):
    """The numbers of pieces; one that isn't there yet is divided into words."""

    def __init__(self, vocabulary: Vocabulary, segment: Segmenter) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.segment = segment

    def __missing__(self, piece: str) -> int:
        if len(piece) <= LONGEST_PIECE:
            words = self.segment(piece)
        else:
            parts = [piece[at : at + LONGEST_PIECE] for at in range(0, len(piece), LONGEST_PIECE)]
            words = [word for part in parts for word in self.segment(part)]
        number = self[piece] = self.vocabulary.add_piece(words)
        self.vocabulary.characters += len(piece)
        return number


@dataclass(frozen=True)
class Words:
    """The words of texts. ids: int32[words], the same number for the same word; rows: those of each text."""

    ids: npt.NDArray[np.int32]
    rows: Rows
    vocabulary: Vocabulary = field(repr=False)

    def keep(self, kept: Bools) -> Words:
        """Those of the texts that are kept."""
        return Words(self.ids[self.rows.of(kept)], self.rows.keep(kept), self.vocabulary)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Characters of each word; int32[words]."""
        return np.array(self.vocabulary.lengths)[self.ids]

    @cached_property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each word; uint64[words]."""
        return np.array(self.vocabulary.hashes)[self.ids]

    def have(self, bit: int) -> Bools:
        """Which words have the bit; bool[words]."""
        having: Bools = (np.array(self.vocabulary.bits) & bit) != 0
        return having[self.ids]

    def stop_words(self, languages: Sequence[Language]) -> Int64:
        """How many different stop words of its language each text has. languages: of each text."""
        found = np.zeros(len(languages), np.int64)
        for language in {id(each): each for each in languages}.values():
            chosen = np.zeros(len(self.vocabulary.words) + 1, np.bool_)
            chosen[[self.vocabulary.words.get(word, -1) for word in language.stop_words]] = True
            hits = chosen[self.ids]
            pairs = np.unique(self.rows.owners[hits] << 32 | self.ids[hits])
            own = np.array([each is language for each in languages])
            found += own * np.bincount(pairs >> 32, minlength=len(languages))
        return found

    def sentences(self) -> Int64:
        """Sentences of each text: one begins at the first word, and at each that is no punctuation after one that ends
        a sentence (as spaCy's sentencizer has it)."""
        terminal = self.have(TERMINAL)
        ordinary = np.flatnonzero(~terminal & ~self.have(PUNCTUATION))
        owners = self.rows.owners[ordinary]
        ended = np.concatenate([[0], np.cumsum(terminal)])
        before = ended[self.rows.offsets[owners]]
        follows = np.flatnonzero(owners[1:] == owners[:-1])
        before[follows + 1] = ended[ordinary[follows]]
        begins = owners[ended[ordinary] > before]
        return np.bincount(begins, minlength=len(self.rows.counts)) + (self.rows.counts > 0)


def words_of(documents: Documents) -> Words:
    """The words of a batch, for Documents.derive."""
    return divide(documents.texts, languages_of(documents))


def divide(texts: Sequence[str], languages: Sequence[Language]) -> Words:
    """The words of texts, each in its language."""
    vocabulary = _vocabulary()
    tables = {language.words: vocabulary.table(language.words) for language in languages}
    found, counts = array("i"), []
    for text, language in zip(texts, languages, strict=True):
        pieces = text.split()
        counts.append(len(pieces))
        found.extend(map(tables[language.words].__getitem__, pieces))
    pieces_found, starts = np.array(found), np.array(vocabulary.starts)
    lengths = np.diff(starts)[pieces_found]
    within = Rows.of_counts(lengths)
    places = np.repeat(starts[pieces_found] - within.offsets[:-1], lengths) + np.arange(within.offsets[-1])
    ids = np.array(vocabulary.parts)[places]
    return Words(ids, Rows.of_counts(Rows.of_counts(np.array(counts, np.int64)).sums(lengths)), vocabulary)


_segmenter = cache(segmenter)
_kept: list[Vocabulary] = []


def _vocabulary() -> Vocabulary:
    if not _kept or _kept[0].characters > MOST_CHARACTERS:
        _kept[:] = [Vocabulary()]
    return _kept[0]


def _bits(word: str) -> int:
    if any(map(str.isalpha, word)):
        return LETTER
    symbol = symbols().issuperset(word)
    punctuation = all(unicodedata.category(character)[0] == "P" for character in word)
    return SYMBOL * symbol | PUNCTUATION * punctuation | TERMINAL * (word in terminal_punctuation())
