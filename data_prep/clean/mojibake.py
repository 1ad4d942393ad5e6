"""Repair of texts that were decoded by a wrong charset, and Unicode's normal form.

Design choices:
- ftfy repairs, line by line, since lines come from different places. Of what it can do only the repair of encodings is
  used: quotes, ligatures and full-width characters are the author's (in Chinese, the punctuation is full-width).
- ftfy's test for mojibake takes a second for 7 MB. It finds only sequences with some characters that few texts hold, so
  it is given those characters and their neighbours alone, and a text only if that says so.
- Normalizing takes the square of the length of a run of combining marks: texts with a run that no language has stay as
  they are.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import BADNESS_RE, is_bad

from megatrain.data_prep.clean.changes import replace
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes

NEIGHBOURS = 2
"""Characters before and after those of SUSPECTS that a sequence of mojibake may have."""
LONGEST_RUN = 100
"""Combining marks on one character, of a text that is normalized; Unicode's stream-safe form has 30."""


@cache
def _suspects() -> re.Pattern[str]:
    """Runs of characters one of which each sequence has that ftfy takes for mojibake."""
    literal = re.findall("[^\0-\x7f](?:-[^\0-\x7f])?", BADNESS_RE.pattern)
    return re.compile(f"[\x80-\xa0\xad{''.join(literal)}]+")


@cache
def _long_run() -> re.Pattern[str]:
    marks = "".join(mark for mark in map(chr, range(0x300, 0x1F000)) if unicodedata.combining(mark))
    return re.compile(f"[{marks}]{{{LONGEST_RUN}}}")


def has_mojibake(text: str) -> bool:
    """Whether ftfy might find a sequence in it."""
    parts = [text[max(0, run.start() - NEIGHBOURS) : run.end() + NEIGHBOURS] for run in _suspects().finditer(text)]
    return bool(parts) and is_bad("\n".join(parts))


def repair(text: str) -> str:
    """The text with each line as it was before it was decoded wrongly."""
    if not has_mojibake(text):
        return text
    config = ftfy.TextFixerConfig(explain=False)
    return "\n".join(line if line.isascii() else ftfy.fix_encoding(line, config) for line in text.split("\n"))


def normalize(text: str) -> str:
    """The text in normal form C."""
    if unicodedata.is_normalized("NFC", text) or _long_run().search(text):
        return text
    return unicodedata.normalize("NFC", text)


class UnicodeRepair:
    """A step: repair and normalize. Texts of ASCII are never Python objects."""

    name = "unicode"

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        """All documents; those that were changed are noted as mojibake or nfc."""
        text = documents.batch.column("text")
        others = pc.invert(pc.string_is_ascii(text))
        what: list[str | None] = [None] * len(documents)
        texts: list[str] = []
        rows = np.flatnonzero(others.to_numpy(zero_copy_only=False))
        for row, old in zip(rows, text.filter(others).to_pylist(), strict=True):
            repaired = repair(old)
            texts.append(normalize(repaired))
            if texts[-1] != old:
                what[row] = "mojibake" if repaired != old else "nfc"
        new = pc.replace_with_mask(text, others, pa.array(texts, text.type)) if any(what) else text
        return replace(self.name, documents, new, what, notes)
