"""Lists of what isn't wanted, given as files: domains, URLs and parts of them; words.

Design choices:
- Published lists have millions of domains. They are kept as sorted 64-bit hashes, 8 bytes each; with 10^7 of them one
  domain in 10^12 is taken for one that it isn't.
- A domain on the list stands for all below it: each ending of the host is looked up.
- Words are looked up among those of a text; phrases, and words of languages written without spaces, in the text itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import UrlListConfig, WordListConfig
from megatrain.data_prep.filters.languages import find
from megatrain.data_prep.notes import Notes
from megatrain.errors import InputError

WORD = re.compile(r"\w+")
EVERY_LANGUAGE = "all"


def read_list(path: str | None, key: str) -> list[str]:
    """The entries of a file in lower case; none of no file. InputError: it can't be read; names the key."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}={path}: {error}") from None
    return [line.strip().lower() for line in lines if line.strip() and not line.startswith("#")]


class Entries:
    """A set of strings, of which only hashes are kept."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.hashes = np.unique(_hashes(entries))

    def first(self, entries: Iterable[str]) -> str | None:
        """The first of the entries that is in the set."""
        entries = list(entries)
        if len(self.hashes) == 0 or not entries:
            return None
        asked = _hashes(entries)
        places = np.minimum(np.searchsorted(self.hashes, asked), len(self.hashes) - 1)
        found = self.hashes[places] == asked
        return entries[int(found.argmax())] if found.any() else None


class UrlList:
    """A step; see UrlListConfig. InputError: a file can't be read."""

    name = "url_list"

    def __init__(self, config: UrlListConfig) -> None:
        self.domains = Entries(read_list(config.domains, "filters.url_list.domains"))
        self.urls = Entries(read_list(config.urls, "filters.url_list.urls"))
        self.substrings = read_list(config.substrings, "filters.url_list.substrings")

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        found = [self._judge(url) for url in documents.column("url")]
        return notes.drop(self.name, documents, [reason for reason, _ in found], [entry for _, entry in found])

    def _judge(self, url: str | None) -> tuple[str | None, str | None]:
        """Why a document is dropped, and the entry that says so."""
        if url is None:
            return None, None
        lowered = url.lower()
        for reason, entry in (
            ("domains", self.domains.first(_domains(lowered))),
            ("urls", self.urls.first([lowered])),
            ("substrings", next((part for part in self.substrings if part in lowered), None)),
        ):
            if entry is not None:
                return reason, entry
        return None, None


class Phrases:
    """Words and phrases to look for in texts. All in lower case."""

    def __init__(self, entries: Sequence[str]) -> None:
        self.entries = entries
        self.words = {entry for entry in entries if WORD.fullmatch(entry)}
        self.longer = [entry for entry in entries if entry not in self.words]

    def find(self, text: str, spaced: bool) -> str | None:
        """One that is in the text. spaced: only as whole words."""
        if not spaced:
            return next((entry for entry in self.entries if entry in text), None)
        words = self.words.intersection(WORD.findall(text))
        return min(words) if words else next((entry for entry in self.longer if _whole(entry, text)), None)


class WordList:
    """A step; see WordListConfig. InputError: a file can't be read."""

    name = "word_list"

    def __init__(self, config: WordListConfig) -> None:
        self.phrases = {
            language: Phrases(read_list(path, f"filters.word_list.words.{language}"))
            for language, path in config.words.items()
        }

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        codes = documents.column("language")
        found = [self._find(text.lower(), code) for text, code in zip(documents.texts, codes, strict=True)]
        return notes.drop(self.name, documents, [None if entry is None else "words" for entry in found], found)

    def _find(self, text: str, code: str | None) -> str | None:
        """An entry of the lists for the language, or for all, that is in the text."""
        lists = [self.phrases[language] for language in (code, EVERY_LANGUAGE) if language in self.phrases]
        found = (phrases.find(text, find(code).spaced) for phrases in lists)
        return next((entry for entry in found if entry is not None), None)


def _whole(entry: str, text: str) -> bool:
    """Whether an entry is in the text with no word going on at its ends."""
    return entry in text and re.search(rf"(?<!\w){re.escape(entry)}(?!\w)", text) is not None


def _domains(url: str) -> list[str]:
    """The host of a URL and every domain above it, without a port."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:  # Not a URL: square brackets without an address in them.
        return []
    labels = host.split(".")
    return [".".join(labels[at:]) for at in range(len(labels))]


def _hashes(entries: Iterable[str]) -> npt.NDArray[np.uint64]:
    return np.fromiter((xxhash.xxh3_64_intdigest(entry.encode()) for entry in entries), np.uint64)
