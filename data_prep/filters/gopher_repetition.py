"""Gopher's rules of repetition (Rae et al. 2021, Table A1): documents that say the same again and again."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import REPEATED_NGRAMS, TOP_NGRAMS, GopherRepetitionConfig
from megatrain.data_prep.filters.languages import languages_of, threshold
from megatrain.data_prep.filters.lines import Lines, lines_of, paragraphs_of
from megatrain.data_prep.filters.ngrams import ngrams, repeated_characters, top_characters
from megatrain.data_prep.filters.ragged import Array
from megatrain.data_prep.filters.rules import Rules, ratio
from megatrain.data_prep.filters.words import words_of
from megatrain.data_prep.notes import Notes


class GopherRepetition:
    """A step; see GopherRepetitionConfig."""

    name = "gopher_repetition"

    def __init__(self, config: GopherRepetitionConfig) -> None:
        self.config = config

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        config = self.config
        characters = np.asarray(pc.utf8_length(documents.batch.column("text")))
        rules = Rules(documents)

        paragraphs = documents.derive(paragraphs_of)
        repeated = ratio(paragraphs.rows.sums(paragraphs.repeats), paragraphs.rows.counts)
        rules.at_most("max_repeated_paragraph_share", repeated, config.max_repeated_paragraph_share)
        repeated = ratio(paragraphs.rows.sums(paragraphs.repeats * paragraphs.lengths), characters)
        rules.at_most("max_repeated_paragraph_character_share", repeated, config.max_repeated_paragraph_character_share)

        lines, languages = documents.derive(lines_of), languages_of(documents)
        most = threshold(config.max_repeated_line_share, languages, lambda language: language.repeated_lines)
        rules.at_most("max_repeated_line_share", _repeated_lines(lines), most)
        repeated = ratio(lines.rows.sums(lines.repeats * lines.lengths), characters)
        rules.at_most("max_repeated_line_character_share", repeated, config.max_repeated_line_character_share)

        words = documents.derive(words_of)
        for n, grams in enumerate(ngrams(words, REPEATED_NGRAMS[-1]), 1):
            if n in TOP_NGRAMS:
                most = _at(TOP_NGRAMS.index(n), config.max_top_ngram_shares, [each.top_ngrams for each in languages])
                rules.at_most(f"max_top_ngram_shares[{n}]", ratio(top_characters(words, grams, n), characters), most)
            elif n in REPEATED_NGRAMS:
                at = REPEATED_NGRAMS.index(n)
                most = _at(at, config.max_repeated_ngram_shares, [each.repeated_ngrams for each in languages])
                found = ratio(repeated_characters(words, grams, n), characters)
                rules.at_most(f"max_repeated_ngram_shares[{n}]", found, most)
        return rules.apply(self.name, notes)


def _at(place: int, given: list[float] | None, of_languages: list[list[float]]) -> Array:
    """The threshold of one n: what is configured, else each language's; float64[documents] or []."""
    return np.array(given or of_languages, np.float64)[..., place]


def _repeated_lines(lines: Lines) -> Array:
    """The share of lines that repeat an earlier one, where several newlines count as one; float64[documents].

    So only a text's first and last line can be empty, and the last then repeats the first.
    """
    empty = lines.lengths == 0
    first, last = empty[lines.rows.offsets[:-1]], empty[lines.rows.offsets[1:] - 1]
    counts = lines.rows.sums(~empty) + first + last
    return ratio(lines.rows.sums(lines.repeats & ~empty) + (first & last), counts)
