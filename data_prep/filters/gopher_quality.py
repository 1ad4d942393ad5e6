"""Gopher's rules of quality (Rae et al. 2021, section A1.1): documents that don't look like prose."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import GopherQualityConfig
from megatrain.data_prep.filters.languages import languages_of, threshold
from megatrain.data_prep.filters.lines import Lines, all_lines_of
from megatrain.data_prep.filters.ragged import Array, Int64
from megatrain.data_prep.filters.rules import Rules, ratio
from megatrain.data_prep.filters.words import LETTER, SYMBOL, words_of
from megatrain.data_prep.notes import Notes


class GopherQuality:
    """A step; see GopherQualityConfig."""

    name = "gopher_quality"

    def __init__(self, config: GopherQualityConfig) -> None:
        self.config = config

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        config, languages = self.config, languages_of(documents)
        words = documents.derive(words_of)
        all_words = words.rows.counts
        ordinary = ~words.have(SYMBOL)
        counts = words.rows.sums(ordinary)
        lengths = ratio(words.rows.sums(words.lengths * ordinary), counts)
        shortest = threshold(config.min_mean_word_length, languages, lambda language: language.mean_word_length[0])
        longest = threshold(config.max_mean_word_length, languages, lambda language: language.mean_word_length[1])
        hashes = ratio(_count(documents, "#"), all_words)
        ellipses = ratio(_count(documents, "...") + _count(documents, "…"), all_words)
        bullet_lines, ellipsis_lines = _line_shares(documents.derive(all_lines_of))
        letters = ratio(words.rows.sums(words.have(LETTER)), all_words)
        least_letters = threshold(config.min_alphabetic_share, languages, lambda language: language.alphabetic)
        stop_words = np.array([min(config.min_stop_words, len(language.stop_words)) for language in languages])

        rules = Rules(documents)
        rules.at_least("min_words", counts, config.min_words)
        rules.at_most("max_words", counts, config.max_words)
        rules.at_least("min_mean_word_length", lengths, shortest)
        rules.at_most("max_mean_word_length", lengths, longest)
        rules.at_most("max_hashes_per_word", hashes, config.max_hashes_per_word)
        rules.at_most("max_ellipses_per_word", ellipses, config.max_ellipses_per_word)
        rules.at_most("max_bullet_line_share", bullet_lines, config.max_bullet_line_share)
        rules.at_most("max_ellipsis_line_share", ellipsis_lines, config.max_ellipsis_line_share)
        rules.at_least("min_alphabetic_share", letters, least_letters)
        rules.at_least("min_stop_words", words.stop_words(languages), stop_words)
        return rules.apply(self.name, notes)


def _count(documents: Documents, text: str) -> Int64:
    return np.asarray(pc.count_substring(documents.batch.column("text"), text)).astype(np.int64)


def _line_shares(lines: Lines) -> tuple[Array, Array]:
    """The shares of lines that begin with a bullet, and that end in an ellipsis; float64[documents]."""
    counts = lines.rows.counts - (lines.lengths[lines.rows.offsets[1:] - 1] == 0)
    return ratio(lines.rows.sums(lines.bullets), counts), ratio(lines.rows.sums(lines.ellipses), counts)
