"""The bytes of a piece of the input: brought here from a store, and decompressed.

Design choices:
- A piece of a remote file is copied to a temporary file first, at the place it has in the whole (a hole is before it),
  so that all else knows nothing of stores, and what was checked is what is read.
- Decompression streams, in a bounded buffer. A file that grows beyond all that text does is broken: it's a bomb, or as
  good as one.
"""

from __future__ import annotations

import io
import lzma
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO

import pyarrow as pa

from megatrain.data_prep.read.config import ReadConfig
from megatrain.data_prep.read.files import COLUMNAR, Piece, suffix_of
from megatrain.data_prep.read.records import BrokenFileError
from megatrain.storage import REMOTE_CALL_BYTES, URL, StorageError, one_line, root

BUFFER = 1 << 20
LINE_BYTES = 1 << 16
"""Read at once of the line that a piece ends with."""
EXPANSION_FREE = 64 * 1024 * 1024
"""Decompressed bytes that no one asks about."""
XZ_MEMORY = 256 * 1024 * 1024
"""What a file of .xz may ask for; `xz -9` asks for 65 MiB."""
ARROW_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


@contextmanager
def local(piece: Piece, config: ReadConfig, most: int | None = None) -> Iterator[Piece]:
    """The piece on a file system. Raises StorageError.

    A remote file that isn't found was there when the input was listed, and stores' libraries say the same of a server
    that doesn't answer well: that is no reason to leave the file out.
    most: where the beginning is enough, about how many bytes of it; a table is always whole.
    """
    if not URL.match(piece.path):
        yield piece
        return
    remote = root(piece.path, "input")
    with tempfile.NamedTemporaryFile(prefix="prep-", suffix="".join(suffix_of(piece.path))) as copy:
        begin = max(piece.start - 1, 0)  # the byte before says whether a line begins at `start`
        size = most if piece.stop is None else piece.stop - begin
        copy.seek(begin)
        try:
            with one_line(remote), remote.fs.open(remote.path, "rb", block_size=REMOTE_CALL_BYTES) as file:
                if begin:
                    file.seek(begin)
                _copy(file, copy, None if piece.path.endswith(COLUMNAR) else size, config.max_document_bytes)
        except FileNotFoundError as error:
            raise StorageError(str(error)) from error
        copy.flush()
        yield replace(piece, path=copy.name)


def _copy(file: IO[bytes], copy: IO[bytes], size: int | None, longest_line: int) -> None:
    """Copies `size` bytes and the rest of the line they end in; all of the file where it is None."""
    while chunk := file.read(BUFFER if size is None else min(size, BUFFER)):
        copy.write(chunk)
        size = None if size is None else size - len(chunk)
    while size is not None and longest_line > 0 and (chunk := file.read(LINE_BYTES)):
        line, end, _ = chunk.partition(b"\n")
        copy.write(line + end)
        longest_line = 0 if end else longest_line - len(line)


def open_bytes(piece: Piece, config: ReadConfig) -> BinaryIO:
    """The bytes of a local file, decompressed by its suffix, from the file's beginning.

    Truncation and a wrong checksum raise OSError while it is read; a bomb raises BrokenFileError.
    """
    packed = suffix_of(piece.path)[1]
    if not packed:
        return Path(piece.path).open("rb", BUFFER)
    inner = _Unxz(piece.path) if packed == ".xz" else pa.input_stream(piece.path, compression=ARROW_CODECS[packed])
    return io.BufferedReader(_Bounded(inner, most_bytes(piece, config), config), BUFFER)


def most_bytes(piece: Piece, config: ReadConfig) -> int:
    """What a packed file may grow to."""
    return max(EXPANSION_FREE, config.max_expansion * piece.size)


def bomb(config: ReadConfig) -> BrokenFileError:
    """The error for a file that grows beyond that."""
    most = config.max_expansion
    return BrokenFileError(f"a bomb: grows more than {most} times when unpacked (read.max_expansion={most})")


class _Bounded(io.RawIOBase):
    """A stream that may not be longer than `most` bytes."""

    def __init__(self, inner: io.RawIOBase, most: int, config: ReadConfig) -> None:
        self._inner, self._left, self._config = inner, most, config

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._inner.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise bomb(self._config)
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()


class _Unxz(io.RawIOBase):
    """.xz, one stream or more; unlike the lzma module's file it doesn't take what memory the file asks for."""

    def __init__(self, path: str) -> None:
        self._file = io.BufferedReader(io.FileIO(path), BUFFER)
        self._decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._decoder.eof:
                rest = (self._decoder.unused_data or self._file.read(BUFFER)).lstrip(b"\0")  # padding is legal
                if not rest and not self._file.peek(1):
                    return 0
                self._decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            else:
                rest = self._file.read(BUFFER) if self._decoder.needs_input else b""
                if not rest and self._decoder.needs_input:
                    raise OSError("the .xz file is truncated")
            try:
                data = self._decoder.decompress(rest, len(buffer))
            except lzma.LZMAError as error:
                raise OSError(str(error)) from None
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
