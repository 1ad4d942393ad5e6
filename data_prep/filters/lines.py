"""The lines of documents, as arrays: each a number that stands for its text, and what filters ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatrain.data_prep.documents import Bools, Documents
from megatrain.data_prep.filters.ragged import Int64, Rows
from megatrain.data_prep.filters.words import terminal_punctuation

OTHER_LINE_ENDS = "\r\n|[\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]"
"""What str.splitlines takes for one beside the newline."""
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class Lines:
    """Pieces of texts. array: large_string[lines]; rows: those of each text."""

    array: pa.LargeStringArray
    rows: Rows

    def keep(self, kept: Bools) -> Lines:
        """Those of the texts that are kept."""
        return Lines(self.array.filter(pa.array(self.rows.of(kept))), self.rows.keep(kept))

    @cached_property
    def lengths(self) -> Int64:
        """Characters of each; int64[lines]."""
        return np.asarray(pc.utf8_length(self.array))

    @cached_property
    def repeats(self) -> Bools:
        """Which were there before in their text."""
        return self.rows.repeats(np.asarray(self.array.dictionary_encode().indices).astype(np.int64))

    @cached_property
    def blank(self) -> Bools:
        """Which have nothing but whitespace."""
        return np.asarray(pc.equal(pc.binary_length(self._trimmed), 0))

    @cached_property
    def terminal(self) -> Bools:
        """Which end in terminal punctuation, with nothing behind it."""
        last = pc.utf8_slice_codeunits(self.array, -1)
        return np.asarray(pc.is_in(last, pa.array(sorted(terminal_punctuation()), pa.large_string())))

    @cached_property
    def bullets(self) -> Bools:
        """Which begin with a bullet, whitespace aside."""
        return np.asarray(pc.or_(*(pc.starts_with(self._trimmed, each) for each in BULLETS)))

    @cached_property
    def ellipses(self) -> Bools:
        """Which end in an ellipsis, whitespace aside."""
        return np.asarray(pc.or_(*(pc.ends_with(self._trimmed, each) for each in ELLIPSES)))

    @cached_property
    def _trimmed(self) -> pa.LargeStringArray:
        return pc.utf8_trim_whitespace(self.array)


def lines_of(documents: Documents) -> Lines:
    """What lies between newlines; one more than there are newlines. For Documents.derive."""
    return _split(pc.split_pattern(documents.batch.column("text"), "\n"))


def all_lines_of(documents: Documents) -> Lines:
    """The lines as str.splitlines has them, but for one more, empty, after a line end at the end of the text."""
    texts = documents.batch.column("text")
    if not pc.any(pc.match_substring_regex(texts, OTHER_LINE_ENDS)).as_py():
        return documents.derive(lines_of)
    return _split(pc.split_pattern(pc.replace_substring_regex(texts, OTHER_LINE_ENDS, "\n"), "\n"))


def paragraphs_of(documents: Documents) -> Lines:
    """What lies between empty lines. For Documents.derive."""
    return _split(pc.split_pattern_regex(pc.utf8_trim_whitespace(documents.batch.column("text")), "\n{2,}"))


def _split(lists: pa.ListArray) -> Lines:
    return Lines(lists.flatten(), Rows.of_counts(np.asarray(pc.list_value_length(lists))))
