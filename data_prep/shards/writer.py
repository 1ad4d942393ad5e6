"""The writing side of the shard format: one tar with its index.

Design choices:
- An index appears before its tar, so a tar is never without one.
- USTAR headers hold the name, the size and zeros, so equal input gives equal bytes.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data.format import VERSION, Member, ShardEntry, index_path, member_digest
from megatrain.data_prep.files import AtomicFile

END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
EMPTY_TAR_BYTES = len(END_OF_TAR)


def member_bytes(*payloads: int) -> int:
    """What a member of payloads of so many bytes adds to a tar."""
    return sum(1 + -(-payload // tarfile.BLOCKSIZE) for payload in payloads) * tarfile.BLOCKSIZE


class ShardWriter:
    """Writes one tar and its index. Both appear at `commit`; `discard` leaves nothing."""

    def __init__(self, path: Path) -> None:
        self._tar = AtomicFile(path)
        self._members: list[Member] = []

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
