"""C4's rules (Raffel et al. 2020, section 2.2): leaves out lines that are no prose, and documents of few sentences.

Design choices:
- The word list is a filter of its own (lists.py), as in the published code.
- Beside the paper's rules stand two of the published code: no line with a word of 1000 characters, none about cookies
  and terms of use.
- Where words are written without spaces between them, the words of a line are the segmenter's, and the length of a word
  isn't judged; languages other than English may end a sentence as their script does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import C4Config
from megatrain.data_prep.filters.languages import Language, find, languages_of
from megatrain.data_prep.filters.ragged import Int64, Rows
from megatrain.data_prep.filters.rules import Rules
from megatrain.data_prep.filters.words import divide, terminal_punctuation
from megatrain.data_prep.notes import Notes

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
ENGLISH_ENDS = (".", "?", "!", '"', "'")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


LOREM_IPSUM, CURLY_BRACKET = "lorem_ipsum", "curly_bracket"


class C4:
    """A step; see C4Config."""

    name = "c4"

    def __init__(self, config: C4Config) -> None:
        self.config = config
        self.every_end = (*ENGLISH_ENDS, *sorted(terminal_punctuation()), *"”’」』）»")  # noqa: RUF001

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        languages = languages_of(documents)
        found = [self._lines(text, language) for text, language in zip(documents.texts, languages, strict=True)]
        lines, sentences = self._sentences([lines for lines, _ in found], languages)
        rules = Rules(documents)
        for unwanted in (LOREM_IPSUM, CURLY_BRACKET):
            rules.drop(unwanted, np.array([reason == unwanted for _, reason in found], np.bool_), sentences)
        rules.at_least("min_sentences", sentences, self.config.min_sentences)
        left = rules.apply(self.name, notes)
        texts = ["\n".join(each) for each, reason in zip(lines, rules.reasons, strict=True) if reason is None]
        changed = [None if new == old else "lines" for new, old in zip(texts, left.texts, strict=True)]
        notes.change(self.name, left, changed, texts)
        return left.with_texts(texts)

    def _lines(self, text: str, language: Language) -> tuple[list[str], str | None]:
        """The lines of a text that are kept, and what the whole text is dropped for."""
        config = self.config
        ends = ENGLISH_ENDS if language is find("en") else self.every_end
        kept = []
        for line in map(str.strip, text.splitlines()):
            edited = CITATION.sub("", line) if config.remove_citations and "[" in line else line
            if config.require_terminal_punctuation and (not edited.endswith(ends) or edited.endswith("...")):
                continue
            if language.spaced and self._odd_words(line):
                continue
            lowered = edited.lower()
            if "lorem ipsum" in lowered:
                return [], LOREM_IPSUM
            if "javascript" in lowered:
                continue
            if "{" in edited:
                return [], CURLY_BRACKET
            if not any(policy in lowered for policy in POLICIES):
                kept.append(edited)
        return kept, None

    def _odd_words(self, line: str) -> bool:
        """Whether a line has too few words, or too long a one."""
        words, longest = line.split(), self.config.max_word_length
        too_long = len(line) > longest and max(map(len, words)) > longest
        return too_long or len(words) < self.config.min_words_per_line

    def _sentences(self, lines: Sequence[list[str]], languages: Sequence[Language]) -> tuple[list[list[str]], Int64]:
        """The lines of each text, in languages without spaces those of enough words; and the sentences in them,
        int64[texts]."""
        rows = Rows.of_counts(np.array([len(each) for each in lines], np.int64))
        flat = [line for each in lines for line in each]
        words = divide(flat, [languages[owner] for owner in rows.owners])
        spaced = np.array([language.spaced for language in languages], np.bool_)[rows.owners]
        kept = spaced | (words.rows.counts >= self.config.min_words_per_line)
        left: list[list[str]] = [[] for _ in lines]
        for line, owner, keep in zip(flat, rows.owners, kept, strict=True):
            if keep:
                left[owner].append(line)
        return left, rows.sums(words.sentences() * kept)
