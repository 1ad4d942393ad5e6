"""Text files to documents: .txt, .jsonl (both also .gz or .zst) and .parquet.

Design choices:
- The input is a list of units, known before work starts: files in sorted order, small ones together, a large plain
  .jsonl cut at lines. Units are what workers take, and their order is the order of the output.
- A file that can't be read to its end gives nothing: `check` reads a piece through before its documents are taken, so
  a repaired file can be prepared later without repeating any. That costs a few percent of tokenizing.
- A bad record is a Problem in the stream, not an exception; the rest of the file goes on.
- Memory is bounded by a record, or a Parquet batch.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatrain.data_prep.config import ColumnsConfig
from megatrain.errors import bad_value

PLAIN = (".txt", ".jsonl")
SUFFIXES = (*PLAIN, *(plain + packed for plain in PLAIN for packed in (".gz", ".zst")), ".parquet")
PARQUET_ROWS = 256
"""Rows decoded at once."""
BUFFER = 1 << 20
SPREAD = 64
"""Units that a sample is taken from in turn."""
MOST_SAMPLED = 1 << 16
"""About how many units the input is cut into for a sample, at most."""


class Document(NamedTuple):
    """One text, and where it is from. `metadata` is JSON of all else that its record held, or None."""

    text: str
    id: str
    url: str | None
    source: str | None
    language: str | None
    metadata: str | None


class Problem(NamedTuple):
    """A record that can't be used. kind: invalid_json, not_utf8, no_text or empty. place: FILE:BYTE or FILE:ROW."""

    kind: str
    place: str


class BrokenFileError(Exception):
    """A file that can't be read to its end, and why."""


@dataclass(frozen=True)
class Piece:
    """What of a file is read: the lines that begin in [start, stop), in bytes, of a plain .jsonl; else all of it.

    name: the path below the input's folder, what people see. size: bytes of the file that this accounts for.
    """

    path: str
    name: str
    size: int
    start: int = 0
    stop: int | None = None


Unit = tuple[Piece, ...]
Files = list[tuple[Path, str]]
"""Paths, and the names that people see."""


def find_files(pattern: str) -> tuple[Files, int]:
    """The files of `input` with their names, in sorted order, and how many of a folder's files were ignored.

    Raises InputError if there is nothing, if all files are empty, or if one that was asked for has an unknown suffix.
    """
    path = Path(pattern)
    if pattern and path.exists():
        root, matches = (path if path.is_dir() else path.parent), [path]
    else:
        fixed = min((pattern.index(sign) for sign in "*?[" if sign in pattern), default=len(pattern))
        below = pattern.rfind("/", 0, fixed) + 1
        root = Path(pattern[:below])
        try:
            matches = list(root.glob(pattern[below:])) if pattern[below:] else []
        except ValueError as error:
            raise bad_value("input", pattern, str(error)) from None
    files, ignored = set(), 0
    for match in matches:
        if not match.is_dir():
            if not match.name.endswith(SUFFIXES):
                raise bad_value("input", match, f"the suffix is none of {', '.join(SUFFIXES)}")
            files.add(match)
            continue
        inside = [file for file in match.rglob("*") if file.is_file()]
        known = [file for file in inside if file.name.endswith(SUFFIXES)]
        files.update(known)
        ignored += len(inside) - len(known)
    if not files:
        raise bad_value("input", pattern, f"no file there with one of the suffixes {', '.join(SUFFIXES)}")
    if not any(file.stat().st_size for file in files):
        raise bad_value("input", pattern, f"all {len(files)} files there are empty")
    return [(file, file.relative_to(root).as_posix()) for file in sorted(files)], ignored


def plan(files: Files, unit_bytes: int) -> list[Unit]:
    """Cuts the input into units of about `unit_bytes`, in order."""
    units: list[Unit] = []
    pieces: list[Piece] = []
    filled = 0
    for path, name in files:
        for piece in _pieces(path, name, unit_bytes):
            if pieces and filled + piece.size > unit_bytes:
                units.append(tuple(pieces))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece.size
    units.append(tuple(pieces))
    return units


def _pieces(path: Path, name: str, unit_bytes: int) -> Iterator[Piece]:
    size = path.stat().st_size
    if path.name.endswith(".jsonl") and size:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(str(path), name, stop - start, start, stop)
    else:
        yield Piece(str(path), name, size)


def check(piece: Piece) -> None:
    """Reads a piece through. Raises BrokenFileError if its bytes can't be had or don't decompress."""
    try:
        if piece.path.endswith(".parquet"):
            for _ in pq.ParquetFile(piece.path).iter_batches(PARQUET_ROWS, use_threads=False):
                pass
        else:
            with _open(piece) as file:
                if piece.start:
                    file.seek(piece.start)
                while file.read(BUFFER) and (piece.stop is None or file.tell() < piece.stop):
                    pass
    except (OSError, pa.ArrowException) as error:
        raise BrokenFileError(" ".join(str(error).split())) from error


def read(piece: Piece, columns: ColumnsConfig) -> Iterator[Document | Problem]:
    """The documents of a piece that `check` found whole, in order. Raises BrokenFileError without the text column."""
    if piece.path.endswith(".parquet"):
        return _read_parquet(piece, columns)
    if ".jsonl" in Path(piece.path).suffixes:
        return _read_jsonl(piece, columns)
    return _read_txt(piece)


def sample(files: Files, columns: ColumnsConfig, limit: int) -> Iterator[Document]:
    """Documents of about `limit` bytes from all over the input, always the same ones; problems are passed over.

    The input is cut finer than for work. The units are visited in hashed order, SPREAD of them in turn, each for a
    small share of `limit`. Files aren't checked first, so a broken one may give what comes before its break.
    """
    total = sum(path.stat().st_size for path, _ in files)
    turn = max(limit // (2 * SPREAD), 1)
    units = plan(files, max(turn, total // MOST_SAMPLED))
    waiting = iter(sorted(units, key=lambda unit: xxhash.xxh3_64_intdigest(f"{unit[0].name}:{unit[0].start}".encode())))
    reading = deque(_documents(unit, columns) for unit in islice(waiting, SPREAD))
    while reading and limit > 0:
        documents, taken = reading.popleft(), 0
        for document in documents:
            yield document
            taken += len(document.text.encode())
            if taken >= turn:
                reading.append(documents)
                break
        else:
            reading.extend(_documents(unit, columns) for unit in islice(waiting, 1))
        limit -= taken


def _documents(unit: Unit, columns: ColumnsConfig) -> Iterator[Document]:
    for piece in unit:
        with contextlib.suppress(BrokenFileError, OSError, pa.ArrowException):  # named when its unit is prepared
            yield from (found for found in read(piece, columns) if isinstance(found, Document))


def _open(piece: Piece) -> BinaryIO:
    """The bytes of a text file, decompressed by its suffix. Truncation and a wrong checksum raise OSError."""
    if piece.path.endswith((".gz", ".zst")):
        return io.BufferedReader(pa.input_stream(piece.path), BUFFER)
    return Path(piece.path).open("rb", BUFFER)


def _read_txt(piece: Piece) -> Iterator[Document | Problem]:
    with _open(piece) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Problem("not_utf8", piece.name)
        return
    yield _document({"text": text}, piece.name, ColumnsConfig())


def _read_jsonl(piece: Piece, columns: ColumnsConfig) -> Iterator[Document | Problem]:
    with _open(piece) as file:
        position = piece.start
        if position:  # the line that the piece before ends with, unless one begins exactly here
            file.seek(position - 1)
            position += len(file.readline()) - 1
        for line in file:
            if piece.stop is not None and position >= piece.stop:
                return
            place, position = f"{piece.name}:{position}", position + len(line)
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode()
                if text.isspace():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError:
                yield Problem("not_utf8", place)
            except (ValueError, RecursionError):
                yield Problem("invalid_json", place)
            else:
                yield _document(record, place, columns)


def _read_parquet(piece: Piece, columns: ColumnsConfig) -> Iterator[Document | Problem]:
    file = pq.ParquetFile(piece.path)
    if columns.text not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise BrokenFileError(f"no column {columns.text!r} (columns.text=); it has {names}")
    row = 0
    for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
        for record in _rows(batch):
            place, row = f"{piece.name}:{row}", row + 1
            yield Problem("not_utf8", place) if record is None else _document(record, place, columns)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows as Python objects; None where a string isn't UTF-8, which Parquet doesn't check."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for index in range(batch.num_rows) for row in _rows(batch.slice(index, 1))]


def _document(record: Any, place: str, columns: ColumnsConfig) -> Document | Problem:
    """A record as a document, or what is wrong with it."""
    if not isinstance(record, dict) or not isinstance(text := record.pop(columns.text, None), str):
        return Problem("no_text", place)
    if not text or text.isspace():
        return Problem("empty", place)
    keys = (columns.id, columns.url, columns.source, columns.language)
    found = [None if value is None else str(value) for value in (record.pop(key, None) for key in keys)]
    try:  # JSON may hold half a surrogate pair, which no UTF-8 text can
        for value in (text, *found):
            _ = value and value.encode()
    except UnicodeEncodeError:
        return Problem("not_utf8", place)
    metadata = json.dumps(record, default=str) if record else None
    return Document(text, found[0] or place, found[1], found[2], found[3], metadata)
