"""What the filters know of a language (languages.yaml), and which language a document is in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.ragged import Array


@dataclass(frozen=True)
class Language:
    """One language's figures; the file says what they are of."""

    also: list[str]
    words: str
    mean_word_length: list[float]
    alphabetic: float
    stop_words: list[str]
    repeated_lines: float
    top_ngrams: list[float]
    repeated_ngrams: list[float]
    terminal_lines: float
    short_lines: float
    repeated_line_characters: float
    newlines_per_word: float

    @property
    def spaced(self) -> bool:
        """Whether spaces stand between its words: then the rules are spaCy's, whose names have two letters."""
        return len(self.words) == 2


@cache
def known() -> dict[str, Language]:
    """The languages by their ISO 639-1 and 639-3 codes, and `other`."""
    rows = yaml.safe_load(Path(__file__).with_name("languages.yaml").read_text(encoding="utf-8"))
    languages = {code: Language(**row) for code, row in rows.items()}
    return languages | {code: language for language in languages.values() for code in language.also}


@cache
def find(code: str | None) -> Language:
    """The language of a code with or without a script or a country: zh, zho, zh-TW, cmn_Hani. None: other."""
    languages = known()
    return languages.get(re.split("[-_]", code or "")[0].lower(), languages["other"])


def languages_of(documents: Documents) -> list[Language]:
    """The language of each document, by its column."""
    return [find(code) for code in documents.column("language")]


def threshold(given: float | None, languages: Sequence[Language], figure: Callable[[Language], float]) -> float | Array:
    """What is configured; if that is null, each document's language's figure, float64[documents]."""
    return given if given is not None else np.array([figure(language) for language in languages], np.float64)
