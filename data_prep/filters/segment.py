"""How the text between two spaces is divided into words, language by language.

Design choices:
- Languages written with spaces: spaCy's rules for prefixes, suffixes and infixes, as in datatrove. They look at what
  stands between spaces and at nothing around it, so each such piece is divided once and remembered (words.py).
- Chinese: jieba's dictionary and hidden Markov model (rjieba).
- Japanese: where the script changes. Thai, Lao, Khmer, Burmese: every so many letters, about the mean length of a word.
  Tibetan: syllables. These aren't words; they are as many and as long as words are, which is what thresholds on counts
  and on repeated n-grams need. Real segmenters for them are a hundred times slower or carry a model of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from megatrain.errors import InputError

SCRIPTS = {
    "japanese": "[一-鿿㐀-䶿々〆]+|[ぁ-ゟ]+|[゠-ヿㇰ-ㇿｦ-ﾟ]+",  # noqa: RUF001
    "tibetan": "[ༀ-࿿]+?(?:་+|$|(?=[^ༀ-࿿]))",
    "pieces": "[฀-๿]{1,SIZE}|[຀-໿]{1,SIZE}|[ក-៿]{1,SIZE}|[က-႟]{1,SIZE}",
}
"""A word in the scripts of these languages."""
ELSE = "[0-9A-Za-zÀ-ɏ]+|."
"""What else may stand beside it: runs of Latin letters and digits, single signs."""


class Segmenter(Protocol):
    """Divides text without whitespace into words."""

    def __call__(self, text: str) -> list[str]: ...

    def session(self) -> AbstractContextManager[object]:
        """To be held while texts are divided: what is remembered of them is let go at its end."""


class SpacyRules:
    """spaCy's rules for a language; without a model."""

    def __init__(self, language: str) -> None:
        import spacy

        self.pipeline = spacy.blank(language)
        # Only the words are asked for, not their shape or whether they are URLs.
        self.pipeline.vocab.lex_attr_getters = {}
        tokenizer = self.pipeline.tokenizer
        if tokenizer.suffix_search is not None:
            tokenizer.suffix_search = _near_end(tokenizer.suffix_search)
        self.special = tokenizer.rules

    def __call__(self, text: str) -> list[str]:
        if text.isalpha() and text not in self.special:  # No rule divides between letters.
            return [text]
        return [token.text for token in self.pipeline.tokenizer(text)]

    def session(self) -> AbstractContextManager[object]:
        return self.pipeline.memory_zone()


def _near_end(search: Callable[..., object]) -> Callable[[str], object]:
    """A search for a suffix that doesn't try every place of the text: but for dots in a row, none is longer than 24."""
    return lambda text: search(text, 0 if text.endswith("..") else max(0, len(text) - 24))


class Function:
    """Words by a function."""

    def __init__(self, divide: Callable[[str], list[str]]) -> None:
        self.divide = divide

    def __call__(self, text: str) -> list[str]:
        return self.divide(text)

    def session(self) -> AbstractContextManager[object]:
        return nullcontext()


def segmenter(words: str) -> Segmenter:
    """That of a language. words: as in languages.yaml."""
    try:
        if words == "chinese":
            import rjieba

            return Function(rjieba.cut)
        if len(words) == 2:
            return SpacyRules(words)
    except ImportError as error:
        raise InputError(f"filters: {error.name} is missing: pip install 'megatrain[prep]'") from None
    script, _, size = words.partition(":")
    return Function(re.compile(f"{SCRIPTS[script].replace('SIZE', size)}|{ELSE}").findall)
