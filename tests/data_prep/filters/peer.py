"""Real documents, and what datatrove decides of them."""

from __future__ import annotations

import ast
import gzip
import random
import re
import site
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter

from megatrain.data_prep.documents import SCHEMA, Documents
from megatrain.data_prep.filters.c4 import C4
from megatrain.data_prep.filters.config import C4Config, FineWebConfig, GopherQualityConfig, GopherRepetitionConfig
from megatrain.data_prep.filters.fineweb import FineWeb
from megatrain.data_prep.filters.gopher_quality import GopherQuality
from megatrain.data_prep.filters.gopher_repetition import GopherRepetition
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.step import Step

REASONS = (
    {
        "gopher_short_doc": "min_words",
        "gopher_long_doc": "max_words",
        "gopher_below_avg_threshold": "min_mean_word_length",
        "gopher_above_avg_threshold": "max_mean_word_length",
        "gopher_too_many_hashes": "max_hashes_per_word",
        "gopher_too_many_ellipsis": "max_ellipses_per_word",
        "gopher_too_many_bullets": "max_bullet_line_share",
        "gopher_too_many_end_ellipsis": "max_ellipsis_line_share",
        "gopher_below_alpha_threshold": "min_alphabetic_share",
        "gopher_enough_stop_words": "min_stop_words",
        "dup_para_frac": "max_repeated_paragraph_share",
        "dup_para_char_frac": "max_repeated_paragraph_character_share",
        "dup_line_frac": "max_repeated_line_share",
        "dup_line_char_frac": "max_repeated_line_character_share",
        "lorem_ipsum": "lorem_ipsum",
        "curly_bracket": "curly_bracket",
        "too_few_sentences": "min_sentences",
        "line_punct_ratio": "min_terminal_line_share",
        "short_line_ratio": "max_short_line_share",
        "char_dup_ratio": "max_repeated_line_character_share",
        "list_ratio": "max_newlines_per_word",
    }
    | {f"top_{n}_gram": f"max_top_ngram_shares[{n}]" for n in (2, 3, 4)}
    | {f"duplicated_{n}_n_grams": f"max_repeated_ngram_shares[{n}]" for n in range(5, 11)}
)
"""datatrove's names of our reasons."""

Decision = tuple[str | None, str]
"""Why a document is dropped, and its text where it isn't."""

PACKAGES = Path(site.getsitepackages()[0])
FEW = (PACKAGES / "numpy", *PACKAGES.glob("*.dist-info"))
MANY = (PACKAGES, Path("/usr/share/doc"), Path("/usr/share/man"))
"""Folders with text: few files, and all of a Debian system."""


def batch(texts: Sequence[str], language: str | None = "en", urls: Sequence[str | None] | None = None) -> Documents:
    """Documents of these texts."""
    count = len(texts)
    columns = {
        "id": [str(number) for number in range(count)],
        "text": texts,
        "url": urls or [None] * count,
        "language": [language] * count,
    }
    return Documents(
        pa.RecordBatch.from_pydict({"source": [None] * count, "metadata": [None] * count} | columns, SCHEMA)
    )


def real_documents(count: int, folders: Sequence[Path]) -> list[str]:
    """Documents from the documentation and the docstrings below folders; the same on every call.

    Fewer where there aren't as many.
    """
    files = sorted(path for folder in folders for path in folder.rglob("*") if _is_text(path))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    for path in files:
        if len(texts) >= count:
            break
        texts.extend(_cut(_text(path), random.Random(path.name)))
    return texts[:count]


def _is_text(path: Path) -> bool:
    known = path.name in ("METADATA", "copyright") or path.suffix in (".txt", ".md", ".rst", ".py", ".gz")
    return known and path.is_file() and not path.is_symlink() and path.stat().st_size < 3_000_000


def _text(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode(errors="ignore").replace("\0", "")
    if path.suffix == ".py":
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError:
            return ""
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        return "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
    return re.sub(r"(?m)^\.\S+ ?", "", text) if "/man/" in str(path) else text


def _cut(text: str, seed: random.Random) -> Iterator[str]:
    """At most eight documents of a text, of a few thousand characters each, whole paragraphs."""
    at = 0
    for _ in range(8):
        end = text.find("\n\n", at + int(seed.lognormvariate(7.9, 1.0)))
        part = text[at : end if end >= 0 else len(text)].strip()
        if len(part) > 150:
            yield part
        if end < 0:
            return
        at = end


def our_filters() -> dict[str, Step]:
    """The filters that datatrove has too. Of rules in order the first decides; so once more without those that decide
    most often."""
    return {
        "gopher_quality": GopherQuality(GopherQualityConfig()),
        "gopher_quality, letters unjudged": GopherQuality(
            GopherQualityConfig(min_alphabetic_share=0, min_mean_word_length=0)
        ),
        "gopher_repetition": GopherRepetition(GopherRepetitionConfig()),
        "fineweb": FineWeb(FineWebConfig()),
        "c4": C4(C4Config()),
    }


def their_filters() -> dict[str, BaseFilter]:
    """datatrove's, by the same names."""
    return {
        "gopher_quality": GopherQualityFilter(),
        "gopher_quality, letters unjudged": GopherQualityFilter(max_non_alpha_words_ratio=0, min_avg_word_length=0),
        "gopher_repetition": GopherRepetitionFilter(),
        "fineweb": FineWebQualityFilter(),
        "c4": C4QualityFilter(),
    }


def our_decisions(step: Step, texts: Sequence[str], size: int = 500) -> list[Decision]:
    """Why each document is dropped, and its text where it isn't."""
    decisions: list[Decision] = []
    for start in range(0, len(texts), size):
        notes = Recorded()
        documents = batch(texts[start : start + size])
        left = iter(step(documents, notes).texts)
        decisions += [(reason, next(left) if reason is None else "") for reason in notes.reasons]
    return decisions


def their_decision(peer: BaseFilter, text: str) -> Decision:
    """The same of one document by datatrove, with our names of the reasons."""
    document = Document(text=text, id="0")
    result = peer.filter(document)
    return (REASONS[result[1]], "") if isinstance(result, tuple) else (None, document.text)


class Recorded(Notes):
    """Notes that keep the reasons of the last step."""

    reasons: Sequence[str | None] = ()

    def drop(
        self, step: str, documents: Documents, reasons: Sequence[str | None], values: Sequence[object] | None = None
    ) -> Documents:
        self.reasons = reasons
        return super().drop(step, documents, reasons, values)
