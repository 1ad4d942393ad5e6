"""Tables as text: .csv and .tsv, with the names of the columns in the first line.

Design choices:
- As RFC 4180 has it: a field in double quotes may hold delimiters, line breaks and doubled quotes. .tsv is the same
  with tabs.
- A quote that is never closed ends at the longest record allowed: that record is bad, and reading goes on with the line
  after it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Piece, suffix_of
from megatrain.data_prep.read.records import BrokenFileError, Document, Problem, document
from megatrain.data_prep.read.streams import open_bytes
from megatrain.data_prep.read.text import lines


def read_delimited(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:
    """A document a record. Raises BrokenFileError without the text column."""
    with open_bytes(piece, config) as file:
        records = _records(file, piece, config.max_document_bytes)
        names = next(records, Problem("empty", piece.name))
        if isinstance(names, Problem) or columns.text not in names.fields:
            given = names.kind if isinstance(names, Problem) else ", ".join(names.fields)
            raise BrokenFileError(f"no column {columns.text!r} (columns.text=) in its first line: {given}")
        for record in records:
            if isinstance(record, Problem):
                yield record
            elif len(record.fields) > len(names.fields):
                yield Problem("invalid_csv", record.place)
            else:
                pairs = zip(names.fields, record.fields, strict=False)  # a field that is missing at the end is empty
                found = {name: value for name, value in pairs if value or name == columns.text}
                yield document(found, record.place, columns)


class _Record(NamedTuple):
    place: str
    fields: list[str]


def _records(file: BinaryIO, piece: Piece, longest: int) -> Iterator[_Record | Problem]:
    """The records of a file, that of the names too; empty lines are nothing."""
    csv.field_size_limit(longest)
    source = _Lines(file, longest)
    rows = csv.reader(source, delimiter="\t" if suffix_of(piece.path)[0] == ".tsv" else ",")
    while True:
        place = f"{piece.name}:{source.begin_record()}"
        try:
            fields = next(rows)
        except StopIteration:
            return
        except _BadLineError as error:
            yield Problem(str(error), place)
        except csv.Error:
            yield Problem("invalid_csv", place)
        else:
            if fields:
                yield _Record(place, fields)


class _BadLineError(Exception):
    """Ends a record; says the kind of problem. The csv module goes on with the next line."""


class _Lines:
    """The lines of a file as strings."""

    def __init__(self, file: BinaryIO, longest: int) -> None:
        self._lines = lines(file, 0, longest)
        self._longest = longest
        self._position = self._begin = 0

    def begin_record(self) -> int:
        """Where the next line begins."""
        self._begin = self._position
        return self._begin

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        start, size, line = next(self._lines)
        self._position = start + size
        if line is None or self._position - self._begin > self._longest:
            raise _BadLineError("too_long")
        try:
            return line.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError:
            raise _BadLineError("not_utf8") from None
