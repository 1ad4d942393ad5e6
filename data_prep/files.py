"""Files that appear whole or not at all (law 6).

Design choices:
- A file is written under a hidden name, synced and renamed. Its hash is taken on the way.
- A folder of results is written under a hidden name too, with its record last, and renamed: who finds the name finds
  all of it. What the record says of the files is checked by whoever comes back to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import xxhash

from megatrain.errors import GaveUp

if TYPE_CHECKING:
    from typing_extensions import Buffer

RECORD = "record.json"
READ_BYTES = 1 << 20


class AtomicFile:
    """A file that appears under its name when it is whole and on disk, and never before.

    As a context: committed at the end, discarded on an exception. `size` is the bytes written so far; `xxh3_128` their
    hash, hexadecimal. What can't be written, as on a full disk, raises GaveUp naming the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = xxhash.xxh3_128()
        self._partial = hidden(path)
        with self._naming():
            self._file = self._partial.open("wb")

    @property
    def xxh3_128(self) -> str:
        return self._hash.hexdigest()

    @property
    def closed(self) -> bool:
        """What Arrow asks of a file besides `write`."""
        return self._file.closed

    def write(self, data: Buffer) -> int:
        self._hash.update(data)
        with self._naming():
            written = self._file.write(data)
        self.size += written
        return written

    def commit(self) -> None:
        """fsync, rename, fsync of the folder."""
        with self._naming():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Leaves nothing behind; harmless after a commit."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again where the disk is full
            self._file.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GaveUp(f"{self.path}: can't be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicFolder:
    """A folder of files that appears when `commit` was called, with a record of them. As a context: discarded unless.

    path: where it will be. Files are made through `file`, and end with the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hidden = hidden(path)
        self._files: dict[str, AtomicFile] = {}
        self._hidden.mkdir(parents=True)

    def file(self, name: str) -> AtomicFile:
        """A new file of the folder."""
        self._files[name] = AtomicFile(self._hidden / name)
        return self._files[name]

    def commit(self, key: str, said: dict[str, Any]) -> None:
        """Writes the record and renames. key: what the files are a function of. said: JSON to be kept with them."""
        for file in self._files.values():
            file.commit()
        sync_folder(self._hidden)
        described = {name: {"bytes": file.size, "xxh3_128": file.xxh3_128} for name, file in self._files.items()}
        with AtomicFile(self._hidden / RECORD) as record:
            record.write(json.dumps({"key": key, "files": described, "said": said}).encode())
        try:
            self._hidden.rename(self.path)
        except OSError:
            if not (self.path / RECORD).exists():  # else another process was first, and its bytes are the same
                raise
        sync_folder(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.discard()
        shutil.rmtree(self._hidden, ignore_errors=True)


def hidden(path: Path) -> Path:
    """Where something is until it is whole. Two processes may make the same: one on a machine that was thought lost."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def said(folder: Path) -> Any:
    """What was committed with a folder."""
    return json.loads((folder / RECORD).read_bytes())["said"]


def is_whole(folder: Path, key: str) -> bool:
    """Whether the folder was committed for that key and all its files have the bytes that were written."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return bool(record["key"] == key) and all(
            digest(folder / name) == (file["bytes"], file["xxh3_128"]) for name, file in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest(path: Path) -> tuple[int, str]:
    """The bytes of a file, and their xxh3-128, hexadecimal. Raises OSError."""
    found, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            found.update(data)
            size += len(data)
    return size, found.hexdigest()
