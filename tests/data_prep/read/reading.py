"""What the tests of the readers share."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import zstandard

from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Piece, Unit
from megatrain.data_prep.read.reader import read_unit
from megatrain.data_prep.read.records import BrokenFileError, Document, Problem

COLUMNS = ColumnsConfig()
READ = ReadConfig()
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def all_of(path: Path, columns: ColumnsConfig = COLUMNS, config: ReadConfig = READ) -> list[Document | Problem]:
    """What a file holds: its documents, then its problems. Raises BrokenFileError."""
    return of_unit((Piece(str(path), path.name, path.stat().st_size),), columns, config)


def of_unit(unit: Unit, columns: ColumnsConfig = COLUMNS, config: ReadConfig = READ) -> list[Document | Problem]:
    """The same of a unit."""
    problems: list[Problem] = []

    def on_broken(_: str, why: str) -> None:
        raise BrokenFileError(why)

    batches = read_unit(unit, columns, config, lambda _, problem: problems.append(problem), on_broken)
    rows = [Document(**row) for documents in batches for row in documents.batch.to_pylist()]
    return [*rows, *problems]


def texts(found: list[Document | Problem]) -> list[str]:
    """Their texts, or kinds."""
    return [item.text if isinstance(item, Document) else item.kind for item in found]
