"""Reads a checkpoint of version 1: any range of any parameter, verified.

Design choices:
- What is read is read in whole chunks, and no chunk is used before its hash was checked; none is hashed twice.
- A data file is opened for each contiguous read: a thousand ranks' files don't use up the process's descriptors.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megatrain.checkpoint.format import (
    CALL_BYTES,
    CHUNK_BYTES,
    DIGEST_BYTES,
    BrokenCheckpoint,
    Row,
    check_coverage,
    committed_state,
    data_name,
    hashes_name,
    index_name,
    parse_rows,
    read_commit,
    read_hashed,
)
from megatrain.errors import GaveUp


class DataFile:
    """The bytes of one rank, each chunk verified at first touch."""

    def __init__(self, path: Path, size: int, hashes_path: Path, hashes_digest: str) -> None:
        """size: bytes of the file at `path`. hashes_digest: xxh3-128 of the file of chunk hashes, in hexadecimal."""
        self.path = path
        self.size = size
        self._hashes_path = hashes_path
        self._hashes_digest = hashes_digest
        self._hashes: bytes | None = None
        self._verified = bytearray(-(-size // CHUNK_BYTES))
        self.bytes_read = 0

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fills `out` with the bytes from `offset` on; reads the chunks that hold them and no others."""
        end = offset + len(out)
        if end > self.size:
            raise BrokenCheckpoint(f"{self.path}: its index points past its end")
        last = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, self.size)
        buffer = np.empty(CALL_BYTES, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for start in range(offset // CHUNK_BYTES * CHUNK_BYTES, end, CALL_BYTES):
                block = buffer[: min(CALL_BYTES, last - start)]
                self._read_block(file, start, block)
                low, high = max(offset, start), min(end, start + CALL_BYTES)
                out[low - offset : high - offset] = block[low - start : high - start]

    def verify(self) -> None:
        """Reads and verifies the whole file."""
        buffer = np.empty(CALL_BYTES, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.size, CALL_BYTES):
                self._read_block(file, start, buffer[: min(CALL_BYTES, self.size - start)])

    def _read_block(self, file: BinaryIO, start: int, block: NDArray[np.uint8]) -> None:
        """Fills `block` with whole chunks from byte `start` on, which is a multiple of the chunk's size."""
        if self._hashes is None:
            self._hashes = read_hashed(self._hashes_path, self._hashes_digest)
        file.seek(start)
        view = block.data
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise BrokenCheckpoint(f"{self.path}: ends before its {self.size} bytes")
            view = view[count:]
        self.bytes_read += len(block)
        for position in range(0, len(block), CHUNK_BYTES):
            number = (start + position) // CHUNK_BYTES
            if self._verified[number]:
                continue
            expected = self._hashes[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if xxhash.xxh3_128_digest(block.data[position : position + CHUNK_BYTES]) != expected:
                raise BrokenCheckpoint(f"{self.path}: chunk {number} (of {CHUNK_BYTES} bytes) is altered")
            self._verified[number] = 1


class CheckpointReader:
    """A committed checkpoint, as a ShardReader.

    folder: of one step. state: what the trainer saved. shapes: of every parameter as it is stored.
    Raises BrokenCheckpoint where the folder is not whole; bytes of tensors are verified when they are read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = read_commit(folder)
        self.state = committed_state(folder, self.commit)
        files = self.commit["files"]
        self._files: list[DataFile] = []
        rows: list[Row] = []
        for rank in range(self.commit["world_size"]):
            index = json.loads(read_hashed(folder / index_name(rank), files[index_name(rank)]["xxh3_128"]))
            rows += parse_rows(index)
            size = files[data_name(rank)]["bytes"]
            self._files.append(DataFile(folder / data_name(rank), size, folder / hashes_name(rank), index["hashes"]))
        self.rows = check_coverage(rows)
        self.shapes = {name: rows[0].shape for (_, name), rows in self.rows.items()}

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
        rows = self.rows.get((state, name))
        if rows is None:
            raise GaveUp(f"{self.folder}: holds no {state} of {name}")
        if not 0 <= start <= stop <= rows[-1].stop:
            raise GaveUp(f"{self.folder}: {name} has {rows[-1].stop} elements; {start} to {stop} were asked for")
        tensor = torch.empty(stop - start, dtype=getattr(torch, rows[0].dtype))
        raw = tensor.view(torch.uint8).numpy()
        position = start
        number = bisect_right(rows, start, key=attrgetter("start")) - 1
        while position < stop:
            row = rows[number]
            until = min(stop, row.stop)
            part = raw[(position - start) * tensor.itemsize : (until - start) * tensor.itemsize]
            self._files[row.rank].read_into(row.offset + (position - row.start) * tensor.itemsize, part)
            position = until
            number += 1
        return tensor

    def verify_all(self) -> None:
        """Reads and verifies every byte. Raises BrokenCheckpoint at the first chunk that is altered."""
        for file in self._files:
            file.verify()
