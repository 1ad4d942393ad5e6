"""How a set is cut into samples of S + 1 ids, S being sequence_length: pack units, and concat windows. No torch.

Design choices:
- All tokens of a set stand in one row, member after member; a sample is pieces, each a range of that row. So no token
  is read to find a sample.
- A pack unit is the shortest run of whole consecutive members of one shard that holds at least 256 samples, or the rest
  of the shard. Samples never cross it, so a sample needs one file, and a shard's samples depend on no other shard.
- Concat: windows advance by S and overlap in one id, so each id of a unit but its first is predicted exactly once. The
  last window is short, and padded when read: nothing is dropped. A unit of one token has nothing to predict. Where a
  window lies is arithmetic on token counts. Best-fit packing is in packing.py and best_fit.py.
- Members are columns of numbers, never objects: 52 bytes for a member of 4 MB. For a set of many shards they and its
  pack units are kept in files (tables.py), so that a start parses no indexes and no rank holds what grows with the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from megatrain.data.format import ShardSet
from megatrain.data.order import Int64
from megatrain.data.tables import Array, Column, by_processes, in_memory, set_table
from megatrain.data_config import Packing

UNIT_SAMPLES = 256
IN_MEMORY_SHARDS = 1000
"""A set of more shards has tables of its members and pack units: to make them takes more than half a second."""
SHARDS_A_TASK = 100
TASKS_A_WORKER = 20
"""How much a process reads at once, and how much makes it worth to start one."""


@dataclass(frozen=True)
class Members:
    """All members of a set, in order.

    first_token: int64[members + 1], where each member begins in the row of all tokens; the last: their count.
    shard: int32[members]. documents: int64[members].
    tokens_offset, lengths_offset: int64[members], bytes in the tar. digest: uint8[members, 16], its xxh3-128.
    most_documents: of one member.
    """

    first_token: Int64
    shard: npt.NDArray[np.int32]
    documents: Int64
    tokens_offset: Int64
    lengths_offset: Int64
    digest: npt.NDArray[np.uint8]
    most_documents: int

    def __len__(self) -> int:
        return len(self.shard)


def read_members(shards: ShardSet, index_path: str | None = None) -> Members:
    """All members of a set, from the indexes of its shards; of a large set from a table, which is made first.

    index_path: data.index_path. Raises GaveUp if an index was altered, InputError if the table can't be written.
    """
    if len(shards.manifest.shards) <= IN_MEMORY_SHARDS:
        columns = in_memory(_member_columns(shards))
    else:
        columns = set_table(shards, index_path, "members", lambda: _member_columns(shards))
    digest, most_documents = columns.pop("digest").reshape(-1, 16), int(columns.pop("most_documents")[0])
    return Members(**columns, digest=digest, most_documents=most_documents)


def _member_columns(shards: ShardSet) -> Iterator[Column]:
    entries = shards.manifest.shards
    tasks = [
        ShardSet(shards.folder, replace(shards.manifest, shards=entries.part(first, first + SHARDS_A_TASK)))
        for first in range(0, len(entries), SHARDS_A_TASK)
    ]
    read = list(by_processes(_read_indexes, tasks, 1 + len(tasks) // TASKS_A_WORKER))
    none = np.empty((4, 0), np.int64), b""
    tokens, documents, tokens_offset, lengths_offset = zip(*(part for part, _ in (none, *read)), strict=True)
    yield "first_token", "<i8", [np.zeros(1, np.int64), np.cumsum(np.concatenate(tokens))]
    yield "shard", "<i4", [np.repeat(np.arange(len(entries)), [entry.members for entry in entries])]
    yield "documents", "<i8", documents
    yield "tokens_offset", "<i8", tokens_offset
    yield "lengths_offset", "<i8", lengths_offset
    yield "digest", "u1", [np.frombuffer(digests, np.uint8) for _, digests in (none, *read)]
    yield "most_documents", "<i8", [np.array([max(part.max(initial=0) for part in documents)])]


def _read_indexes(shards: ShardSet) -> tuple[Int64, bytes]:
    """Of all members tokens, documents and the two offsets, int64[4, members], and the digests."""
    members = [member for number in range(len(shards.manifest.shards)) for member in shards.members(number)]
    numbers = [(m.tokens, m.documents, m.tokens_offset, m.lengths_offset) for m in members]
    return np.array(numbers, np.int64).reshape(-1, 4).T, bytes.fromhex("".join(m.xxh3_128 for m in members))


@dataclass(frozen=True)
class Pieces:
    """What samples consist of: [start, stop) of the row of all tokens, sample after sample.

    sample: which of the samples asked for, never decreasing. start, stop: where; 2 to S + 1 ids. All int64[pieces].
    """

    sample: Int64
    start: Int64
    stop: Int64


class SequenceIndex(Protocol):
    """Where each sample of a set lies.

    packing: how documents were put into samples. sequence_length: S. samples: how many there are.
    whole_documents: no document begins within a piece, but each piece is one of its own.
    """

    packing: ClassVar[Packing]
    whole_documents: ClassVar[bool]
    sequence_length: int
    samples: int

    def locate(self, sample: Int64) -> Pieces:
        """The pieces of samples int64[any number], each in 0 to samples - 1; at most S + 1 ids a sample."""

    @property
    def padding_share(self) -> float:
        """The share of all positions, S a sample, that come after the last target of their sample."""


class ConcatIndex:
    """Samples that are windows over pack units: one piece each."""

    packing: ClassVar = Packing.concat
    whole_documents: ClassVar = False

    def __init__(self, columns: dict[str, Array], sequence_length: int) -> None:
        """columns: concat_columns."""
        self.sequence_length = sequence_length
        self._bounds, self._first_sample = columns["bounds"], columns["first_sample"]
        self.samples = int(self._first_sample[-1])

    def locate(self, sample: Int64) -> Pieces:
        unit = np.searchsorted(self._first_sample, sample, side="right") - 1
        start = self._bounds[unit] + (sample - self._first_sample[unit]) * self.sequence_length
        stop = np.minimum(start + self.sequence_length + 1, self._bounds[unit + 1])
        return Pieces(np.arange(len(sample)), start, stop)

    @property
    def padding_share(self) -> float:
        targets = int(np.maximum(np.diff(self._bounds) - 1, 0).sum())
        return 1 - targets / (self.samples * self.sequence_length)


def open_concat(shards: ShardSet, members: Members, sequence_length: int, index_path: str | None = None) -> ConcatIndex:
    """The windows of a set; of a large one from a table, which is made first. Raises InputError if it can't be written.

    members: read_members(shards). index_path: data.index_path.
    """
    if len(shards.manifest.shards) <= IN_MEMORY_SHARDS:
        columns = in_memory(concat_columns(members, sequence_length))
    else:
        name = f"{Packing.concat.value}-{sequence_length}"
        columns = set_table(shards, index_path, name, lambda: concat_columns(members, sequence_length))
    return ConcatIndex(columns, sequence_length)


def concat_columns(members: Members, sequence_length: int) -> Iterator[Column]:
    """bounds: int64[units + 1], the tokens where units begin, and the end. first_sample: int64[units + 1]."""
    bounds = members.first_token[np.append(unit_starts(members, sequence_length), len(members))]
    windows = np.maximum(-((1 - np.diff(bounds)) // sequence_length), 0)  # ceil((tokens - 1) / S)
    yield "bounds", "<i8", [bounds]
    yield "first_sample", "<i8", [np.zeros(1, np.int64), np.cumsum(windows)]


def unit_starts(members: Members, sequence_length: int) -> npt.NDArray[np.intp]:
    """The first member of each pack unit, ascending; every shard at once, unit by unit."""
    needed = (UNIT_SAMPLES - 1) * sequence_length + 2  # the least tokens that make UNIT_SAMPLES windows
    shard_start = np.flatnonzero(np.diff(members.shard, prepend=-1))
    shard_end: npt.NDArray[Any] = np.append(shard_start[1:], len(members))
    starts = []
    while shard_start.size:
        starts.append(shard_start)
        full = np.searchsorted(members.first_token, members.first_token[shard_start] + needed)
        more = full < shard_end
        shard_start, shard_end = full[more], shard_end[more]
    return np.sort(np.concatenate(starts)) if starts else np.empty(0, np.intp)
