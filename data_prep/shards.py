"""The writing side of the shard format: one tar with its index, and the manifest.

Design choices:
- What a reader may see is whole: every file is written under a hidden name, synced and renamed (law 6), an index
  before its tar, the manifest after everything that it lists.
- USTAR headers hold the name, the size and zeros, so equal input gives equal bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data.format import MANIFEST, VERSION, Manifest, Member, ShardEntry, index_path, member_digest
from megatrain.errors import GaveUp

if TYPE_CHECKING:
    from typing_extensions import Buffer

END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


class AtomicFile:
    """A file that appears under its name when it is whole and on disk, and never before.

    As a context: committed at the end, discarded on an exception. `size` is the bytes written so far; `xxh3_128` their
    hash, hexadecimal. What can't be written, as on a full disk, raises GaveUp naming the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = xxhash.xxh3_128()
        self._partial = path.with_name(f".{path.name}.partial")
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


class ShardWriter:
    """Writes one tar and its index. Both appear at `commit`; `discard` leaves nothing."""

    def __init__(self, path: Path) -> None:
        self._tar = AtomicFile(path)
        self._members: list[Member] = []

    def size_with(self, *payloads: npt.NDArray[Any]) -> int:
        """Bytes of the tar if these were added and it were committed."""
        blocks = sum(1 + -(-payload.nbytes // tarfile.BLOCKSIZE) for payload in payloads)
        return self._tar.size + blocks * tarfile.BLOCKSIZE + len(END_OF_TAR)

    def add(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.uint32]) -> None:
        """One member. ids: [tokens], little-endian of the set's id type; lengths: [documents], adding up to tokens."""
        name = f"{len(self._members):06d}"
        tokens_offset = self._file(f"{name}.tokens", ids)
        lengths_offset = self._file(f"{name}.lengths", lengths)
        digest = member_digest(ids.data, lengths.data)
        self._members.append(Member(name, len(ids), len(lengths), tokens_offset, lengths_offset, digest))

    def commit(self, source: str | None, language: str | None, metadata_xxh3_128: str) -> ShardEntry:
        """Finishes the shard and gives its line of the manifest. The index is first: a tar is never without one."""
        self._tar.write(END_OF_TAR)
        index = {"version": VERSION, "members": [asdict(member) for member in self._members]}
        with AtomicFile(index_path(self._tar.path)) as file:
            file.write(json.dumps(index, indent=1).encode())
        self._tar.commit()
        return ShardEntry(
            name=self._tar.path.name,
            bytes=self._tar.size,
            members=len(self._members),
            tokens=sum(member.tokens for member in self._members),
            documents=sum(member.documents for member in self._members),
            source=source,
            language=language,
            xxh3_128=self._tar.xxh3_128,
            index_xxh3_128=file.xxh3_128,
            metadata_xxh3_128=metadata_xxh3_128,
        )

    def discard(self) -> None:
        """Leaves nothing of an uncommitted shard."""
        self._tar.discard()

    def _file(self, name: str, payload: npt.NDArray[Any]) -> int:
        """Writes a tar entry and gives the offset of its payload."""
        header = tarfile.TarInfo(name)  # mode 0644, owner 0, mtime 0
        header.size = payload.nbytes
        self._tar.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._tar.size
        self._tar.write(payload.data)
        self._tar.write(bytes(-payload.nbytes % tarfile.BLOCKSIZE))
        return offset


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commits a split: written last, when every file that it lists is whole on disk."""
    shards = [asdict(shard) for shard in manifest.shards]
    with AtomicFile(folder / MANIFEST) as file:
        file.write(json.dumps(manifest.with_shards(shards) | {"sha256": manifest.sha256}, indent=1).encode())
