"""How the text between two spaces is divided into words, language by language.

Design choices:
- Languages written with spaces: spaCy's rules for prefixes, suffixes and infixes, as in datatrove. They look at what
  stands between spaces and at nothing around it, so each such piece is divided once and remembered (words.py).
- Chinese: jieba's dictionary and hidden Markov model (rjieba).
- Japanese: where the script changes. Thai, Lao, Khmer, Burmese: every so many letters, about the mean length of a word.
  Tibetan: syllables. These aren't words; they are as many and as long as words are, which is what thresholds on counts
  and on repeated n-grams need. Segmenters that know words carry dictionaries or models, a package for each language.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from megatrain.data_prep.filters.spacy_rules import SpacyRules
from megatrain.errors import InputError

SCRIPTS = {
    "japanese": "[一-鿿㐀-䶿々〆]+|[ぁ-ゟ]+|[゠-ヿㇰ-ㇿｦ-ﾟ]+",  # noqa: RUF001
    "tibetan": "[ༀ-࿿]+?(?:་+|$|(?=[^ༀ-࿿]))",
    "pieces": "[฀-๿]{1,SIZE}|[຀-໿]{1,SIZE}|[ក-៿]{1,SIZE}|[က-႟]{1,SIZE}",
}
"""A word in the scripts of these languages."""
ELSE = "[0-9A-Za-zÀ-ɏ]+|."
"""What else may stand beside it: runs of Latin letters and digits, single signs."""


Segmenter = Callable[[str], list[str]]
"""Divides text without whitespace into words."""


def segmenter(words: str) -> Segmenter:
    """That of a language. words: as in languages.yaml."""
    try:
        if words == "chinese":
            import rjieba

            cut: Segmenter = rjieba.cut
            return cut
        if len(words) == 2:
            return SpacyRules(words)
    except ImportError as error:
        raise InputError(f"filters: {error.name} is missing: pip install 'megatrain[prep]'") from None
    script, _, size = words.partition(":")
    return re.compile(f"{SCRIPTS[script].replace('SIZE', size)}|{ELSE}").findall
