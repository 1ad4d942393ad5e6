"""Writes a checkpoint of version 1: each rank its files, then rank 0 the commit record.

Design choices:
- No collective: each function is one rank's own work, and agreeing on success lies between them (manager.py).
- Bytes go straight from the live views to the file and the hash; nothing is gathered, nothing is copied on the CPU.
  They are hashed a call at a time, while they are in the processor's cache.
- The disk works while the next bytes are copied and hashed: a thread syncs the file every SYNC_BYTES, and the writer
  waits for the sync before. Otherwise a node keeps most of a checkpoint in its memory until the sync at the end.
- commit() trusts no rank: sizes are looked at, and the ranks' indexes are merged only where they cover all exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
from megatrain.resilience.files import sync_folder, write_synced, write_whole

SYNC_BYTES = 32 * 1024 * 1024
"""How much is written between two syncs; of 8, 16, 32, 64 and all, 32 was fastest here, 8 and 16 hardly slower."""


class HashedWriter:
    """Appends to a file, takes the xxh3-128 of each chunk of it, and has the disk at work meanwhile."""

    def __init__(self, file: BinaryIO, thread: Executor) -> None:
        """file: buffered, so that small tensors don't become small calls; by less than CALL_BYTES, so that large ones
        aren't copied once more. thread: has nothing else to do.
        """
        self.position = 0
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._digests = bytearray()
        self._thread = thread
        self._synced = 0
        self._syncing: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """Appends `data`, bytes. Raises OSError, also for what was written before."""
        for start in range(0, len(data), CALL_BYTES):
            part = data[start : start + CALL_BYTES]
            self._file.write(part)
            self._take_hashes(part)
            if self.position - self._synced >= SYNC_BYTES:
                self.sync()

    def finish(self) -> bytes:
        """Begins the last sync; returns the digests of all chunks, the shorter last one included."""
        if self.position % CHUNK_BYTES:
            self._end_chunk()
        self.sync()
        return bytes(self._digests)

    def sync(self) -> None:
        """Begins to sync what was written so far, when the sync before is over."""
        self.wait()
        self._file.flush()
        self._syncing = self._thread.submit(os.fsync, self._file.fileno())
        self._synced = self.position

    def wait(self) -> None:
        """Returns when what was synced is on the disk. Raises OSError where it couldn't be."""
        if self._syncing is not None:
            self._syncing.result()

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
    with (folder / data_name(rank)).open("wb", buffering=CHUNK_BYTES) as file, ThreadPoolExecutor(1) as thread:
        writer = HashedWriter(file, thread)
        for shard in shards:
            rows += _write_shard(writer, rank, shard)
        hashes = writer.finish()
        write_synced(folder / hashes_name(rank), hashes)
        write_synced(folder / rows_name(rank), encode_rows(rows, xxhash.xxh3_128_hexdigest(hashes)))
        writer.wait()
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
