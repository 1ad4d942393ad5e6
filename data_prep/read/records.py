"""What readers find in files: documents, one at a time or a table's, and problems; and batches made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from megatrain.data_prep.documents import SCHEMA, Documents
from megatrain.data_prep.read.config import ColumnsConfig


class Document(NamedTuple):
    """One text, and where it is from, in the order of SCHEMA. `metadata` is JSON of all else that its record held."""

    id: str
    text: str
    url: str | None = None
    source: str | None = None
    language: str | None = None
    metadata: str | None = None


class Problem(NamedTuple):
    """A record that can't be used. place: FILE:BYTE or FILE:ROW.

    kind: invalid_json, invalid_csv, not_decoded, not_utf8, too_long, nested, no_text or empty.
    """

    kind: str
    place: str


class BrokenFileError(Exception):
    """A file that can't be read to its end, and why."""


Found = Document | Problem | pa.RecordBatch
"""What a reader gives; a batch is of SCHEMA."""


def document(record: Any, place: str, columns: ColumnsConfig) -> Document | Problem:
    """A record as a document, or what is wrong with it. What isn't named in `columns` becomes the metadata."""
    if not isinstance(record, dict) or not isinstance(text := record.pop(columns.text, None), str):
        return Problem("no_text", place)
    keys = (columns.id, columns.url, columns.source, columns.language)
    found = [None if value is None else str(value) for value in (record.pop(key, None) for key in keys)]
    metadata = json.dumps(record, default=str) if record else None
    return checked(Document(found[0] or place, text, found[1], found[2], found[3], metadata), place)


def checked(found: Document, place: str) -> Document | Problem:
    """The document, unless its text is empty or one of its strings isn't UTF-8."""
    if not found.text or found.text.isspace():
        return Problem("empty", place)
    try:  # JSON may hold half a surrogate pair, which no UTF-8 text can
        for value in found:
            _ = value and value.encode()
    except UnicodeEncodeError:
        return Problem("not_utf8", place)
    return found


def batches(found: Iterable[Document | pa.RecordBatch], batch_bytes: int) -> Iterator[Documents]:
    """The documents in order, in batches of about `batch_bytes` of text."""
    rows: list[Document] = []
    parts: list[pa.RecordBatch] = []
    size = 0
    for item in found:
        if isinstance(item, Document):
            rows.append(item)
            size += len(item.text)
        else:
            parts += [*_table(rows), item]
            rows = []
            size += pc.sum(pc.binary_length(item.column("text"))).as_py()
        if size >= batch_bytes:
            yield Documents(pa.concat_batches([*parts, *_table(rows)]))
            rows, parts, size = [], [], 0
    if parts or rows:
        yield Documents(pa.concat_batches([*parts, *_table(rows)]))


def _table(rows: list[Document]) -> list[pa.RecordBatch]:
    """The rows as a batch of SCHEMA, if there are any."""
    if not rows:
        return []
    columns = zip(zip(*rows, strict=True), SCHEMA.types, strict=True)
    return [pa.record_batch([pa.array(values, kind) for values, kind in columns], schema=SCHEMA)]
