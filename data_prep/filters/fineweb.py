"""FineWeb's own rules (Penedo et al. 2024, section 3.6): lists, and leftovers of a page's frame."""

from __future__ import annotations

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import FineWebConfig
from megatrain.data_prep.filters.languages import languages_of, threshold
from megatrain.data_prep.filters.lines import lines_of
from megatrain.data_prep.filters.rules import Rules, ratio
from megatrain.data_prep.filters.words import words_of
from megatrain.data_prep.notes import Notes


class FineWeb:
    """A step; see FineWebConfig."""

    name = "fineweb"

    def __init__(self, config: FineWebConfig) -> None:
        self.config = config

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        config, languages = self.config, languages_of(documents)
        lines, words = documents.derive(lines_of), documents.derive(words_of)
        rows, written = lines.rows, ~lines.blank
        counts = rows.sums(written)
        short = written & (lines.lengths <= config.short_line_characters)
        repeats = lines.repeats & written
        rules = Rules(documents)
        rules.at_least(
            "min_terminal_line_share",
            ratio(rows.sums(lines.terminal & written), counts),
            threshold(config.min_terminal_line_share, languages, lambda language: language.terminal_lines),
        )
        rules.at_most(
            "max_short_line_share",
            ratio(rows.sums(short), counts),
            threshold(config.max_short_line_share, languages, lambda language: language.short_lines),
        )
        rules.at_most(
            "max_repeated_line_character_share",
            ratio(rows.sums(repeats * lines.lengths), rows.sums(lines.lengths)),
            threshold(
                config.max_repeated_line_character_share, languages, lambda language: language.repeated_line_characters
            ),
        )
        rules.at_most(
            "max_newlines_per_word",
            ratio(rows.counts - 1, words.rows.counts),
            threshold(config.max_newlines_per_word, languages, lambda language: language.newlines_per_word),
        )
        return rules.apply(self.name, notes)
