"""Plain text and JSON lines. Memory is bounded by the longest record allowed, whatever the file holds."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Piece
from megatrain.data_prep.read.records import Document, Problem, checked, document
from megatrain.data_prep.read.streams import BUFFER, open_bytes


def read_txt(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:  # noqa: ARG001
    """The file as one document."""
    with open_bytes(piece, config) as file:
        data = file.read(config.max_document_bytes + 1)
    if len(data) > config.max_document_bytes:
        yield Problem("too_long", piece.name)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Problem("not_utf8", piece.name)
        return
    yield checked(Document(piece.name, text), piece.name)


def read_json_lines(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:
    """A document a line; empty lines are nothing."""
    with open_bytes(piece, config) as file:
        position = piece.start
        if position:  # the line that the piece before ends with, unless one begins exactly here
            file.seek(position - 1)
            position += _skip_line(file, piece.size + 1) - 1
        for start, _, line in lines(file, position, config.max_document_bytes):
            if piece.stop is not None and start >= piece.stop:
                return
            place = f"{piece.name}:{start}"
            if line is None:
                yield Problem("too_long", place)
                continue
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode()
                if not text.isspace():
                    yield document(json.loads(text), place, columns)
            except UnicodeDecodeError:
                yield Problem("not_utf8", place)
            except (ValueError, RecursionError):
                yield Problem("invalid_json", place)


def lines(file: BinaryIO, position: int, longest: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Where each line begins, its bytes, and the line; None in place of a line of more than `longest` bytes.

    position: where the file stands.
    """
    while line := file.readline(longest + 1):
        size = len(line)
        if size > longest and not line.endswith(b"\n"):
            del line  # before the rest of it is passed over
            size += _skip_line(file)
            yield position, size, None
        else:
            yield position, size, line
        position += size


def _skip_line(file: BinaryIO, most: int | None = None) -> int:
    """Bytes up to the next line, which aren't held. most: about what is enough to know."""
    count = 0
    while (most is None or count < most) and (part := file.readline(BUFFER)):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count
