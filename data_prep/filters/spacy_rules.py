"""Words by spaCy's rules for a language: prefixes, suffixes, infixes and special cases, without a model.

Design choices:
- The rules are spaCy's own; what applies them is written here, as its tokenizer does it step by step, since that spends
  more than half of its time on what isn't asked for: a document, and an entry in its vocabulary for every new word.
  Tests compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_SUFFIX = 10
"""Characters in which a suffix is looked for. None is longer, but for a row of dots, and in Greek."""

Rules = Mapping[str, Sequence[str]]


class SpacyRules:
    """Divides text without whitespace into words."""

    def __init__(self, language: str) -> None:
        import spacy
        from spacy.symbols import ORTH

        tokenizer: Any = spacy.blank(language).tokenizer
        self.greek = language == "el"
        self.prefix, self.suffix = tokenizer.prefix_search, tokenizer.suffix_search
        self.infixes, self.is_url = tokenizer.infix_finditer, tokenizer.url_match or _never
        self.is_word = tokenizer.token_match or _never
        self.special: Rules = {text: [part[ORTH] for part in parts] for text, parts in tokenizer.rules.items()}
        # Special cases that affixes would divide are looked for once more among the words that came of it.
        divided = filter(self._has_affix, self.special)
        self.rejoined = {tuple(self._by_affixes(text, {})): self.special[text] for text in divided}
        self.sizes: dict[str, set[int]] = {}
        for words in self.rejoined:
            self.sizes.setdefault(words[0], set()).add(len(words))

    def __call__(self, text: str) -> list[str]:
        words = self._by_affixes(text, self.special)
        return words if self.sizes.keys().isdisjoint(words) else self._rejoin(words)

    def _by_affixes(self, text: str, special: Rules) -> list[str]:
        """Takes prefixes and suffixes off, one of each at a time, then divides what is left."""
        before: list[str] = []
        after: list[str] = []
        left = -1
        while len(text) != left and text not in special and not self._whole(text):
            left = len(text)
            start = _length(self.prefix(text))
            if start and text[start:] in special:
                before.append(text[:start])
                text = text[start:]
                break
            rest = text[start:]
            stop = left - self._suffix_length(rest)
            if stop < left and text[:stop] in special:
                after.append(text[stop:])
                text = text[:stop]
                break
            if start:
                before.append(text[:start])
            if stop < left:
                after.append(text[stop:])
            text = text[start:stop]
        return [*before, *self._inner(text, special), *reversed(after)]

    def _inner(self, text: str, special: Rules) -> Sequence[str]:
        """What is left without prefixes and suffixes, divided at infixes."""
        if text in special:
            return special[text]
        if self._whole(text) or self.is_url(text):
            return [text] if text else []
        words = []
        at = 0
        for match in self.infixes(text):
            start, stop = match.span()
            if start > 0:
                words += [text[at:start], text[start:stop]]
                at = stop
        return [word for word in (*words, text[at:]) if word]

    def _rejoin(self, words: list[str]) -> list[str]:
        """Puts special cases in the place of the words that they were divided into; the longest first."""
        spans = [(-size, at) for at, word in enumerate(words) for size in self.sizes.get(word, ())]
        taken: set[int] = set()
        found: list[tuple[int, int]] = []
        for size, at in sorted(spans):
            end = at - size
            if end <= len(words) and tuple(words[at:end]) in self.rejoined:
                if at not in taken and end - 1 not in taken:
                    found.append((at, end))
                taken.update(range(at, end))
        for at, end in sorted(found, reverse=True):
            words[at:end] = self.rejoined[tuple(words[at:end])]
        return words

    def _whole(self, text: str) -> bool:
        """Whether nothing divides a text: no rule does between letters."""
        return not text or text.isalpha() or self.is_word(text) is not None

    def _suffix_length(self, text: str) -> int:
        begin = 0 if self.greek or text.endswith("..") else max(0, len(text) - LONGEST_SUFFIX)
        return _length(self.suffix(text, begin))

    def _has_affix(self, text: str) -> bool:
        return bool(_length(self.prefix(text)) or self._suffix_length(text) or any(True for _ in self.infixes(text)))


def _length(match: re.Match[str] | None) -> int:
    return 0 if match is None else match.end() - match.start()


def _never(_: str) -> None:
    """Stands for a rule that the language hasn't."""
