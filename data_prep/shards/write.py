"""One shard from the results of units: tar, index and metadata. A task of the executors.

Design choices:
- A shard that is there with its record, and whose files have the bytes that the record says, is not written again.
- A row group of the Parquet file holds the documents of one member: row group k, member k.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatrain.data.format import ShardEntry, index_path, metadata_path
from megatrain.data_prep.files import AtomicFile, digest
from megatrain.data_prep.results import METADATA, Done, Results
from megatrain.data_prep.shards.cut import Part
from megatrain.data_prep.shards.writer import ShardWriter

SHARED = ("source", "language")
"""Columns that a shard's line in the manifest tells, where all its documents agree."""


@dataclass(frozen=True)
class ShardTask:
    """key: what the shard is a function of. path: of the tar. record: where it is noted that it is done.

    parts: its documents, in order. members: how many each member has. tokens: of all.
    """

    key: str
    path: str
    record: str
    split: str
    id_dtype: str
    parts: tuple[Part, ...]
    members: tuple[int, ...]
    tokens: int

    @property
    def name(self) -> str:
        """The tar."""
        return self.path

    @property
    def size(self) -> int:
        """Bytes of its tokens."""
        return self.tokens * np.dtype(self.id_dtype).itemsize


@dataclass(frozen=True)
class ShardRecord:
    """entry: the shard in the manifest. counts: [source, language, documents, tokens] of what is in it, sorted."""

    entry: ShardEntry
    counts: list[tuple[str | None, str | None, int, int]]


def write_shard(task: ShardTask) -> Done:
    """Writes the shard, unless it is there; `read_record` then has it. Raises GaveUp where it can't be written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if _is_whole(task):
            return Done(sum(task.members), task.tokens)
    path = Path(task.path)
    tar, counts = ShardWriter(path), _Counts()
    with contextlib.ExitStack() as stack:
        stack.callback(tar.discard)
        file = stack.enter_context(AtomicFile(metadata_path(path)))
        parquet = pq.ParquetWriter(file, METADATA, compression="zstd", write_page_checksum=True)
        stack.callback(_abandon, parquet)
        for ids, lengths, metadata in _members(task):
            tar.add(ids, lengths)
            parquet.write_table(metadata, row_group_size=len(metadata))
            counts.add(metadata, lengths)
        parquet.close()
        entry = tar.commit(counts.shared("source"), counts.shared("language"), file.xxh3_128)
    with AtomicFile(Path(task.record)) as record:
        record.write(json.dumps({"key": task.key, "entry": asdict(entry), "counts": counts.table()}).encode())
    return Done(sum(task.members), task.tokens)


def read_record(task: ShardTask) -> ShardRecord:
    """What write_shard noted."""
    record = json.loads(Path(task.record).read_bytes())
    return ShardRecord(ShardEntry(**record["entry"]), [tuple(row) for row in record["counts"]])


def _abandon(parquet: pq.ParquetWriter) -> None:
    """Closes a writer that may not have come to its end: it would write its footer, and to a full disk."""
    with contextlib.suppress(Exception):
        parquet.close()


def _is_whole(task: ShardTask) -> bool:
    record, path = json.loads(Path(task.record).read_bytes()), Path(task.path)
    if record["key"] != task.key:
        return False
    entry = ShardEntry(**record["entry"])
    return (
        digest(path) == (entry.bytes, entry.xxh3_128)
        and digest(index_path(path))[1] == entry.index_xxh3_128
        and digest(metadata_path(path))[1] == entry.metadata_xxh3_128
    )


def _members(task: ShardTask) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.uint32], pa.Table]]:
    """Ids, lengths and metadata of each member, from as many units as it takes."""
    dtype = np.dtype(task.id_dtype).newbyteorder("<")
    parts = iter(task.parts)
    left = 0
    for documents in task.members:
        ids, lengths, metadata = [], [], []
        while documents:
            if not left:
                part = next(parts)
                results = Results(Path(part.folder), task.split, dtype)
                first, left = part.first, part.documents
            here = min(documents, left)
            ids.append(results.ids(first, here))
            lengths.append(results.lengths[first : first + here])
            metadata.append(results.metadata(first, here))
            first, left, documents = first + here, left - here, documents - here
        yield np.concatenate(ids), np.concatenate(lengths), pa.concat_tables(metadata)


class _Counts:
    """Documents and tokens by source and language."""

    def __init__(self) -> None:
        self._found: dict[tuple[str | None, str | None], tuple[int, int]] = {}

    def add(self, metadata: pa.Table, lengths: npt.NDArray[np.uint32]) -> None:
        """Adds a member's."""
        table = metadata.select(SHARED).append_column("tokens", pa.array(lengths, pa.int64()))
        for row in table.group_by(list(SHARED)).aggregate([("tokens", "count"), ("tokens", "sum")]).to_pylist():
            key = row["source"], row["language"]
            documents, tokens = self._found.get(key, (0, 0))
            self._found[key] = documents + row["tokens_count"], tokens + row["tokens_sum"]

    def shared(self, name: str) -> str | None:
        """The source or language of all documents, if it is one."""
        found = {key[SHARED.index(name)] for key in self._found}
        return found.pop() if len(found) == 1 else None

    def table(self) -> list[tuple[str | None, str | None, int, int]]:
        """The rows of a ShardRecord."""
        return [(*key, *self._found[key]) for key in sorted(self._found, key=lambda key: [name or "" for name in key])]
