"""Parquet and Arrow files. Texts stay in Arrow; only what becomes the metadata is ever a Python object.

Design choices:
- Few rows of Parquet are decoded at once, whatever the size of its row groups, and pages are read as they are needed;
  then rows are gathered again, for the work that each batch costs. So a batch takes a few documents' memory.
- A file that decodes to far more than its size is a bomb, as packed files are: a dictionary may hold one text of
  megabytes for a million rows. A column chunk that says so is not opened.
- Arrow files are mapped, not read; but a compressed batch of theirs is in memory whole. Their offsets are checked
  before anything follows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatrain.data_prep.documents import SCHEMA, Bools
from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Piece
from megatrain.data_prep.read.records import BrokenFileError, Found, Problem
from megatrain.data_prep.read.streams import BUFFER, EXPANSION_FREE, bomb, most_bytes

ROWS = 16
"""Rows of Parquet, and of dictionaries, decoded at once: in the worst case each is as long as the longest of them."""
GATHERED_BYTES = 1 << 20
"""What is worked on at once, about."""
ARROW_FILE = b"ARROW1"
BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
TEXT_TYPES = (*BINARY, *BINARY.values())


def open_batches(piece: Piece, config: ReadConfig) -> Iterator[pa.RecordBatch]:
    """The rows of a local file as they are in it. Raises pa.ArrowException where it is broken, BrokenFileError."""
    most = most_bytes(piece, config)
    waiting: list[pa.RecordBatch] = []
    size = 0
    for coded in _parquet(piece, config) if piece.path.endswith(".parquet") else _arrow(piece):
        batch = _without_dictionaries(coded)
        waiting.append(batch)
        size += batch.nbytes
        most -= batch.nbytes
        if most < 0:
            raise bomb(config)
        if size >= GATHERED_BYTES:
            yield pa.concat_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def read_columnar(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Found]:
    """A document a row. Raises BrokenFileError without a text column that holds text."""
    row = 0
    for batch in open_batches(piece, config):
        yield from convert(batch, row, piece.name, columns, config.max_document_bytes)
        row += len(batch)


def _parquet(piece: Piece, config: ReadConfig) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(piece.path, buffer_size=BUFFER, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            found = file.metadata.row_group(group)
            chunks = [found.column(index) for index in range(found.num_columns)]
            dense = [
                chunk
                for chunk in chunks
                if chunk.total_uncompressed_size > config.max_expansion * chunk.total_compressed_size
            ]
            if any(chunk.total_uncompressed_size > EXPANSION_FREE for chunk in dense):
                raise bomb(config)
            yield from file.iter_batches(1 if dense else ROWS, [group], use_threads=False)


def _arrow(piece: Piece) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(piece.path) as file:
        if file.read(len(ARROW_FILE)) == ARROW_FILE:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            _check_offsets(batch)
            coded = any(map(pa.types.is_dictionary, batch.schema.types))
            rows = ROWS if coded else max(1, len(batch) * GATHERED_BYTES // max(1, batch.nbytes))
            yield from (batch.slice(start, rows) for start in range(0, len(batch), rows))


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    for index, field in enumerate(batch.schema):
        if pa.types.is_dictionary(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).dictionary_decode())
    return batch


def _check_offsets(batch: pa.RecordBatch) -> None:
    """Raises pa.ArrowInvalid where a value doesn't lie in its column. Strings that aren't UTF-8 are found later."""
    for column in batch.columns:
        (column.cast(BINARY[column.type]) if column.type in BINARY else column).validate(full=True)


def convert(
    batch: pa.RecordBatch, first_row: int, name: str, columns: ColumnsConfig, longest: int
) -> Iterator[Problem | pa.RecordBatch]:
    """The rows of a batch as documents of SCHEMA, and what is wrong with the others."""
    _check_text(batch.schema, columns)
    rows = np.arange(first_row, first_row + len(batch))
    for kind, find in CHECKS.items():
        bad = find(batch, columns.text, longest)
        if bad.any():
            yield from (Problem(kind, f"{name}:{row}") for row in rows[bad])
            batch, rows = batch.filter(pa.array(~bad)), rows[~bad]
    if not len(batch):
        return
    places = pc.binary_join_element_wise(f"{name}:", pa.array(rows).cast(pa.string()), "")
    ids = _strings(batch, columns.id)
    named = pc.fill_null(pc.not_equal(ids, ""), False)
    others = [_strings(batch, column) for column in (columns.url, columns.source, columns.language)]
    text = batch.column(columns.text).cast(pa.large_string())
    arrays = [pc.if_else(named, ids, places), text, *others, _metadata(batch, columns)]
    yield pa.record_batch(arrays, schema=SCHEMA)


def _check_text(schema: pa.Schema, columns: ColumnsConfig) -> None:
    if columns.text not in schema.names:
        raise BrokenFileError(f"no column {columns.text!r} (columns.text=); it has {', '.join(schema.names)}")
    if (kind := schema.field(columns.text).type) not in TEXT_TYPES:
        raise BrokenFileError(f"the column {columns.text!r} (columns.text=) holds {kind}, not text")


def _not_utf8(batch: pa.RecordBatch, text: str, longest: int) -> Bools:  # noqa: ARG001
    """Parquet doesn't check its strings."""
    try:
        batch.validate(full=True)
        batch.column(text).cast(pa.large_string())
    except pa.ArrowInvalid:
        return np.array([not _decodes(batch.slice(row, 1), text) for row in range(len(batch))])
    return np.zeros(len(batch), np.bool_)


def _decodes(row: pa.RecordBatch, text: str) -> bool:
    try:
        value = row.to_pylist()[0][text]
        _ = isinstance(value, bytes) and value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _no_text(batch: pa.RecordBatch, text: str, longest: int) -> Bools:  # noqa: ARG001
    return _bools(batch.column(text).is_null())


def _too_long(batch: pa.RecordBatch, text: str, longest: int) -> Bools:
    return _bools(pc.greater(pc.binary_length(batch.column(text)), longest))


def _empty(batch: pa.RecordBatch, text: str, longest: int) -> Bools:  # noqa: ARG001
    whole = batch.column(text).cast(pa.large_string())
    return _bools(pc.or_(pc.equal(pc.binary_length(whole), 0), pc.utf8_is_space(whole)))


def _bools(values: pa.Array) -> Bools:
    found: Bools = values.to_numpy(zero_copy_only=False)
    return found


CHECKS = {"not_utf8": _not_utf8, "no_text": _no_text, "too_long": _too_long, "empty": _empty}
"""Which rows have a problem, bool[rows], by its kind; each is given the rows that the ones before leave."""


def _strings(batch: pa.RecordBatch, column: str) -> pa.Array:
    """A column as strings, whatever it holds; nulls where there is none."""
    if column not in batch.schema.names:
        return pa.nulls(len(batch), pa.string())
    values = batch.column(column)
    if values.type in TEXT_TYPES:
        return values.cast(pa.string())
    return pa.array([None if value is None else str(value) for value in values.to_pylist()], pa.string())


def _metadata(batch: pa.RecordBatch, columns: ColumnsConfig) -> pa.Array:
    """The other columns as JSON."""
    used = {columns.text, columns.id, columns.url, columns.source, columns.language}
    others = batch.select([name for name in batch.schema.names if name not in used])
    if not others.num_columns:
        return pa.nulls(len(batch), pa.string())
    return pa.array([json.dumps(record, default=str) for record in others.to_pylist()], pa.string())
