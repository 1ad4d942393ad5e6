"""The step that finds documents with texts that models are evaluated on: the n-grams of index.py in common.

Design choices:
- One n-gram in common is enough (GPT-3: Brown et al. 2020, appendix C). Which text it is of is named, with the words,
  for people to judge.
- Where spans are taken out, a document stays one document: what is left is joined by line breaks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatrain.data_prep.deduplicate.words import ngrams, places, words
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.screening.config import Contaminated, DecontaminateConfig
from megatrain.data_prep.screening.index import Index

Hit = tuple[int, int, int]
"""The first word in its document, how many, and the number of the evaluation text."""


class Decontaminate:
    """Drops documents with an n-gram of the index, or takes these out."""

    name = "decontaminate"

    def __init__(self, config: DecontaminateConfig, index: Path) -> None:
        """index: what build_index gave. Raises GaveUp where it isn't whole."""
        self._config = config
        self._index = Index(index)

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        hits = self._hits(documents)
        reasons: list[str | None] = [None] * len(documents)
        what: list[str | None] = [None] * len(documents)
        values: list[str | None] = [None] * len(documents)
        texts: dict[int, str] = {}
        for row, found in hits.items():
            text: str = documents.batch.column("text")[row].as_py()
            begins, ends = places(text)
            first, count, number = found[0]
            values[row] = f"{self._index.names[number]}: {text[begins[first] : ends[first + count - 1]]}"
            spans = [(int(begins[first]), int(ends[first + count - 1])) for first, count, _ in found]
            left = self._left(text, spans)
            if left is None:
                reasons[row] = "overlap"
            else:
                what[row], texts[row] = "overlap_removed", left
        notes.change(self.name, documents, what, values)
        if texts:
            documents = documents.with_texts([texts.get(row, text) for row, text in enumerate(documents.texts)])
        return notes.drop(self.name, documents, reasons, values)

    def _hits(self, documents: Documents) -> dict[int, list[Hit]]:
        """What was found in each document with anything, in order."""
        hashes, starts = words(documents.texts)
        hits: dict[int, list[Hit]] = {}
        for length in self._index.lengths:
            grams, first = ngrams(hashes, starts, length)
            at, numbers = self._index.find(grams, length)
            rows = np.searchsorted(first, at, side="right") - 1
            for row, place, number in zip(rows.tolist(), (at - first[rows]).tolist(), numbers.tolist(), strict=True):
                hits.setdefault(row, []).append((place, length, number))
        return {row: sorted(hits[row]) for row in sorted(hits)}

    def _left(self, text: str, spans: list[tuple[int, int]]) -> str | None:
        """The text without the spans, by character and in order, and what surrounds them; None: it is to be dropped."""
        margin = self._config.margin
        joined: list[list[int]] = []
        for begin, end in spans:
            if joined and begin - margin <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end + margin)
            else:
                joined.append([max(0, begin - margin), end + margin])
        if self._config.action is Contaminated.document or len(joined) > self._config.max_spans:
            return None
        begins, ends = [0, *(end for _, end in joined)], [*(begin for begin, _ in joined), len(text)]
        pieces = [text[begin:end].strip() for begin, end in zip(begins, ends, strict=True)]
        return "\n".join(piece for piece in pieces if piece and len(piece) >= margin) or None
