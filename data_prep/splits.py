"""Documents to the shards of one split: where members and shards end, and the metadata beside them.

Design choices:
- Members and shards are filled greedily in the order of the documents, so the bytes depend on that order alone, not
  on the batches that the documents come in.
- A row group of the Parquet file holds the documents of one member: row group k, member k.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatrain.data.format import ShardEntry, metadata_path, shard_name
from megatrain.data_prep.shards import AtomicFile, ShardWriter

METADATA = pa.schema([(name, pa.string()) for name in ("id", "url", "source", "language", "metadata")])
"""The columns of the Parquet file; all but id may be null, metadata is JSON."""


class SplitWriter:
    """Writes the shards of one split into `folder`. `entries` are those committed so far.

    member_bytes: largest payload of tokens, unless one document is larger. shard_bytes: largest tar, unless one member
    is larger.
    """

    def __init__(self, folder: Path, member_bytes: int, shard_bytes: int) -> None:
        self.entries: list[ShardEntry] = []
        self._folder = folder
        self._member_bytes = member_bytes
        self._shard_bytes = shard_bytes
        self._ids: list[npt.NDArray[Any]] = []
        self._lengths: list[npt.NDArray[np.uint32]] = []
        self._metadata: list[pa.RecordBatch] = []
        self._shard: _Shard | None = None

    def add(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.uint32], metadata: pa.RecordBatch) -> None:
        """Documents one after the other. ids: [tokens]; lengths: [documents]; metadata: a row of METADATA each."""
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        first = 0
        while first < len(lengths):
            pending = sum(len(part) for part in self._ids)
            room = self._member_bytes // ids.itemsize - pending
            last = max(first, int(np.searchsorted(ends, ends[first] + room, side="right")) - 1)
            if last == first and not pending:
                last += 1  # larger than a member
            self._ids.append(ids[ends[first] : ends[last]])
            self._lengths.append(lengths[first:last])
            self._metadata.append(metadata.slice(first, last - first))
            if last < len(lengths):
                self._end_member()
            first = last

    def finish(self) -> list[ShardEntry]:
        """Commits the last shard. All shards of the split, in order."""
        self._end_member()
        self._end_shard()
        return self.entries

    def discard(self) -> None:
        """Leaves the committed shards, and nothing of the one begun."""
        if self._shard:
            self._shard.discard()

    def _end_member(self) -> None:
        lengths = np.concatenate([*self._lengths, np.empty(0, "<u4")]).astype("<u4")
        if not len(lengths):
            return
        ids = np.concatenate(self._ids)
        if self._shard and self._shard.tar.size_with(ids, lengths) > self._shard_bytes:
            self._end_shard()
        if not self._shard:
            self._shard = _Shard(self._folder / shard_name(len(self.entries)))
        self._shard.add(ids, lengths, pa.Table.from_batches(self._metadata, METADATA))
        self._ids, self._lengths, self._metadata = [], [], []

    def _end_shard(self) -> None:
        if self._shard:
            self.entries.append(self._shard.commit())
            self._shard = None


class _Shard:
    """A tar, its index and its metadata, being written."""

    def __init__(self, path: Path) -> None:
        self.tar = ShardWriter(path)
        self._file = AtomicFile(metadata_path(path))
        self._parquet = pq.ParquetWriter(self._file, METADATA, compression="zstd", write_page_checksum=True)
        self._sources: set[str | None] = set()
        self._languages: set[str | None] = set()

    def add(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.uint32], metadata: pa.Table) -> None:
        self.tar.add(ids, lengths)
        self._parquet.write_table(metadata, row_group_size=len(metadata))
        self._sources.update(pc.unique(metadata["source"]).to_pylist())
        self._languages.update(pc.unique(metadata["language"]).to_pylist())

    def commit(self) -> ShardEntry:
        self._parquet.close()
        self._file.commit()
        source, language = (found.pop() if len(found) == 1 else None for found in (self._sources, self._languages))
        return self.tar.commit(source, language, self._file.xxh3_128)

    def discard(self) -> None:
        with contextlib.suppress(Exception):  # closing writes the footer, which fails where the disk is full
            self._parquet.close()
        self._file.discard()
        self.tar.discard()
