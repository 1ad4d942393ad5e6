"""Writes a checkpoint of version 1: each rank its files, then rank 0 the commit record.

Design choices:
- No collective: each function is one rank's own work, and agreeing on success lies between them (manager.py).
- Bytes go straight from the live views to the file and the hash; nothing is gathered, nothing is copied on the CPU.
  They are hashed a call at a time, while they are in the processor's cache.
- The disk works while the next bytes are copied and hashed. Left to itself, a node would keep most of a checkpoint in
  its memory until the sync at the end.
- commit() trusts no rank: sizes are looked at, and the ranks' indexes are merged only where they cover all exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash

from megatrain.checkpoint.format import (
    CALL_BYTES,
    CHUNK_BYTES,
    COMMIT,
    DIGEST_BYTES,
    DTYPES,
    INDEX,
    STATE,
    VERSION,
    BrokenCheckpoint,
    Commit,
    FileRecord,
    TrainerState,
    data_name,
    encode,
    file_names,
    hashes_name,
    rows_name,
    seal,
)
from megatrain.checkpoint.index import Row, encode_index, encode_rows, merge, parse_rows
from megatrain.engines.ranges import Shard
from megatrain.resilience.files import begin_to_sync, sync_folder, write_synced, write_whole

DISK_BYTES = 8 * 1024 * 1024
"""How much is written before the disk is told to begin with it; 2 and 32 MB were measured a little slower."""


class HashedWriter:
    """Appends to a file and takes the xxh3-128 of each chunk of it."""

    def __init__(self, file: BinaryIO) -> None:
        """file: buffered, so that small tensors don't become small calls; by less than CALL_BYTES, so that large ones
        aren't copied once more.
        """
        self.position = 0
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._digests = bytearray()
        self._begun = 0

    def write(self, data: memoryview) -> None:
        """Appends `data`, bytes."""
        for start in range(0, len(data), CALL_BYTES):
            part = data[start : start + CALL_BYTES]
            self._file.write(part)
            self._take_hashes(part)
            if self.position - self._begun >= DISK_BYTES:
                self._begin_to_sync()

    def finish(self) -> bytes:
        """The digests of all chunks, the shorter last one included. What is left is to sync the file."""
        if self.position % CHUNK_BYTES:
            self._end_chunk()
        self._begin_to_sync()
        return bytes(self._digests)

    def _begin_to_sync(self) -> None:
        begin_to_sync(self._file, self._begun)
        self._begun = self.position

    def _take_hashes(self, data: memoryview) -> None:
        while len(data):
            part = data[: CHUNK_BYTES - self.position % CHUNK_BYTES]
            self._hash.update(part)
            self.position += len(part)
            if self.position % CHUNK_BYTES == 0:
                self._end_chunk()
            data = data[len(part) :]

    def _end_chunk(self) -> None:
        self._digests += self._hash.digest()
        self._hash.reset()


def owned(shard: Shard) -> Iterator[tuple[int, int, int]]:
    """What this replica writes: (start, stop, offset into the view) for its slice of each range, in elements."""
    offset = 0
    for start, stop in shard.ranges:
        size = stop - start
        first, last = (size * i // shard.replicas for i in (shard.replica, shard.replica + 1))
        if first < last:
            yield start + first, start + last, offset + first
        offset += size


def write_rank(folder: Path, rank: int, shards: Iterable[Shard]) -> None:
    """Writes and syncs this rank's data, chunk hashes and index. Raises OSError, as writing does.

    Raises ValueError where a view hasn't the elements of its ranges (padding that an engine forgot to cut off) or is
    of a dtype that the format hasn't.
    """
    rows: list[Row] = []
    with (
        (folder / data_name(rank)).open("wb", buffering=CHUNK_BYTES) as data_file,
        (folder / hashes_name(rank)).open("wb") as hashes_file,
        (folder / rows_name(rank)).open("wb") as index_file,
    ):
        writer = HashedWriter(data_file)
        for shard in shards:
            rows += _write_shard(writer, rank, shard)
        hashes = writer.finish()
        hashes_file.write(hashes)
        index_file.write(encode_rows(rows, xxhash.xxh3_128_hexdigest(hashes)))
        # All are begun before the first is waited for: a file system with a journal then writes it once.
        for small in (hashes_file, index_file):
            begin_to_sync(small)
        for file in (data_file, hashes_file, index_file):
            os.fsync(file.fileno())
    sync_folder(folder)


def _write_shard(writer: HashedWriter, rank: int, shard: Shard) -> Iterator[Row]:
    elements = sum(stop - start for start, stop in shard.ranges)
    for state, view in shard.tensors.items():
        dtype = str(view.dtype).removeprefix("torch.")
        if view.shape != (elements,) or dtype not in DTYPES:
            raise ValueError(f"{state} of {shard.name}: {dtype}{list(view.shape)} for {elements} elements")
        # The one place where state leaves the device. Saving isn't the training path: it may wait for the copy.
        data = view.detach().cpu().contiguous().view(torch.uint8).numpy().data
        for start, stop, offset in owned(shard):
            yield Row(rank, state, shard.name, shard.shape, dtype, start, stop, writer.position)
            writer.write(data[offset * view.itemsize : (offset + stop - start) * view.itemsize])


def commit(folder: Path, step: int, world_size: int, state: TrainerState) -> None:
    """Writes the trainer's state, merges and checks what all ranks wrote, and makes the folder a checkpoint.

    Rank 0 only, last. Raises BrokenCheckpoint where a file is missing or the ranges of all ranks don't cover every
    parameter exactly.
    """
    hashed = {STATE: encode({"version": VERSION, **state}), INDEX: _merged(folder, world_size)}
    for name, raw in hashed.items():
        write_synced(folder / name, raw)
    for rank in range(world_size):
        (folder / rows_name(rank)).unlink()
    sync_folder(folder)
    files: dict[str, FileRecord] = {}
    for name in file_names(world_size):
        files[name] = {"bytes": _size(folder / name)}
    for name, raw in hashed.items():
        files[name]["xxh3_128"] = xxhash.xxh3_128_hexdigest(raw)
    record: Commit = {"version": VERSION, "step": step, "world_size": world_size, "files": files}
    write_whole(folder / COMMIT, seal(record))


def _merged(folder: Path, world_size: int) -> bytes:
    """index.json, of the ranks' own indexes."""
    hashes: list[str] = []

    def rows() -> Iterator[Row]:
        for rank in range(world_size):
            size, digests = _size(folder / data_name(rank)), _size(folder / hashes_name(rank))
            if digests != -(-size // CHUNK_BYTES) * DIGEST_BYTES:
                raise BrokenCheckpoint(f"{folder / data_name(rank)}: {size} bytes, but {digests} bytes of hashes")
            _size(folder / rows_name(rank))
            own, digest = parse_rows((folder / rows_name(rank)).read_bytes(), rank)
            hashes.append(digest)
            yield from own

    return encode_index(merge(rows()), hashes)


def _size(path: Path) -> int:
    if not path.is_file():
        raise BrokenCheckpoint(f"{path}: missing; is the run directory on a file system all nodes share?")
    return path.stat().st_size
