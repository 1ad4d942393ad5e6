"""Reads a checkpoint of version 1: any range of any parameter, verified.

Design choices:
- What is read is read in whole chunks, and no chunk is used before its hash was checked; one that is read again is
  checked again.
- The pieces of a range are asked for together, whichever ranks' files they are in: from an object store they come at
  the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatrain.checkpoint.format import (
    CALL_BYTES,
    CHUNK_BYTES,
    DIGEST_BYTES,
    INDEX,
    BrokenCheckpoint,
    check_hash,
    committed_state,
    data_name,
    hashes_name,
    read_commit,
    read_hashed,
)
from megatrain.checkpoint.index import parse_index
from megatrain.errors import GaveUp
from megatrain.storage import REMOTE_CALL_BYTES, Folder, read_ranges


class DataFile:
    """The bytes of one rank."""

    def __init__(self, folder: Folder, rank: int, size: int, hashes_digest: str) -> None:
        """size: bytes of its data file. hashes_digest: xxh3-128 of its file of chunk hashes, in hexadecimal."""
        self.folder = folder
        self.rank = rank
        self.size = size
        self.hashes: bytes | None = None
        self.bytes_read = 0
        self._hashes_digest = hashes_digest

    @property
    def path(self) -> Folder:
        """The file."""
        return self.folder / data_name(self.rank)

    @property
    def hashes_size(self) -> int:
        """Bytes of the file of chunk hashes."""
        return -(-self.size // CHUNK_BYTES) * DIGEST_BYTES

    def take_hashes(self, hashes: bytes) -> None:
        """Verifies and keeps the chunk hashes."""
        self.hashes = check_hash(self.folder / hashes_name(self.rank), hashes, self._hashes_digest)

    def verify(self, start: int, stop: int, block: memoryview) -> None:
        """Raises BrokenCheckpoint where `block` isn't what was written as bytes [start, stop), whole chunks."""
        assert self.hashes is not None
        if len(block) < stop - start:
            raise BrokenCheckpoint(f"{self.path}: ends before its {self.size} bytes")
        self.bytes_read += len(block)
        for position in range(0, len(block), CHUNK_BYTES):
            number = (start + position) // CHUNK_BYTES
            expected = self.hashes[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if xxhash.xxh3_128_digest(block[position : position + CHUNK_BYTES]) != expected:
                raise BrokenCheckpoint(f"{self.path}: chunk {number} (of {CHUNK_BYTES} bytes) is altered")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a data file, which somebody wants."""

    file: DataFile
    start: int
    stop: int

    def calls(self) -> Iterator[tuple[int, int]]:
        """The chunks that hold them, in ranges of bytes that are each best read by one call."""
        if self.stop > self.file.size:
            raise BrokenCheckpoint(f"{self.file.path}: its index points past its end")
        size = CALL_BYTES if isinstance(self.file.folder, Path) else REMOTE_CALL_BYTES
        last = min(-(-self.stop // CHUNK_BYTES) * CHUNK_BYTES, self.file.size)
        for start in range(self.start // CHUNK_BYTES * CHUNK_BYTES, self.stop, size):
            yield start, min(start + size, last)


def verified(folder: Folder, pieces: Sequence[Piece]) -> Iterator[memoryview]:
    """The bytes of the pieces, all of `folder`, in order, cut anywhere. A view is valid until the next one.

    All reads are known before the first is made: an object store gets many at a time.
    """
    try:
        files = list({piece.file: None for piece in pieces if piece.file.hashes is None})
        tables = read_ranges(folder, [(hashes_name(file.rank), 0, file.hashes_size) for file in files])
        for file, table in zip(files, tables, strict=True):
            file.take_hashes(bytes(table))
        calls = [(piece, start, stop) for piece in pieces for start, stop in piece.calls()]
        blocks = read_ranges(folder, [(data_name(piece.file.rank), start, stop) for piece, start, stop in calls])
        for (piece, start, stop), block in zip(calls, blocks, strict=True):
            piece.file.verify(start, stop, block)
            yield block[max(piece.start - start, 0) : piece.stop - start]
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{folder}: removed while it was read ({error})") from error


class CheckpointReader:
    """A committed checkpoint, as a ShardReader.

    folder: of one step. state: what the trainer saved. index: the ranges. shapes: of every parameter as it is stored.
    Raises BrokenCheckpoint where the folder is not whole; bytes of tensors are verified when they are read.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.commit = read_commit(folder)
        self.state = committed_state(folder, self.commit)
        files, world_size = self.commit["files"], self.commit["world_size"]
        raw = read_hashed(folder / INDEX, files[INDEX]["bytes"], files[INDEX]["xxh3_128"])
        self.index, hashes = parse_index(raw, world_size)
        self.shapes = {name: ranges.shape for (_, name), ranges in self.index.items()}
        sizes = [files[data_name(rank)]["bytes"] for rank in range(world_size)]
        self._files = [DataFile(folder, *one) for one in zip(range(world_size), sizes, hashes, strict=True)]

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer has taken."""
        return self.state["optimizer_step"]

    @property
    def bytes_read(self) -> int:
        """Bytes of data files read so far."""
        return sum(file.bytes_read for file in self._files)

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`: 1-D, on the CPU, in the dtype it was stored in.

        Raises BrokenCheckpoint where a chunk is altered, GaveUp where the checkpoint doesn't hold those elements.
        """
        ranges = self.index.get((state, name))
        if ranges is None:
            raise GaveUp(f"{self.folder}: holds no {state} of {name}")
        if not 0 <= start <= stop <= ranges.size:
            raise GaveUp(f"{self.folder}: {name} has {ranges.size} elements; {start} to {stop} were asked for")
        tensor = torch.empty(stop - start, dtype=getattr(torch, ranges.dtype))
        pieces = []
        for rank, begin, end, offset in ranges.overlapping(start, stop):
            first, last = (offset + (edge - begin) * tensor.itemsize for edge in (max(start, begin), min(stop, end)))
            pieces.append(Piece(self._files[rank], first, last))
        raw = tensor.view(torch.uint8).numpy().data
        for block in verified(self.folder, pieces):
            raw[: len(block)] = block
            raw = raw[len(block) :]
        return tensor

    def verify_all(self) -> None:
        """Reads and verifies every byte. Raises BrokenCheckpoint at the first chunk that is altered."""
        for file in self._files:
            for _ in verified(self.folder, [Piece(file, 0, file.size)] if file.size else []):
                pass
