"""How a set is cut into samples of S + 1 ids, S being sequence_length: pack units, and concat windows. No torch.

Design choices:
- All tokens of a set stand in one row, member after member; a sample is pieces, each a range of that row. So no token
  is read to find a sample.
- A pack unit is the shortest run of whole consecutive members of one shard that holds at least 256 samples, or the rest
  of the shard. Samples never cross it, so a sample needs one file, and a shard's samples depend on no other shard.
- Concat: windows advance by S and overlap in one id, so each id of a unit but its first is predicted exactly once. The
  last window is short, and padded when read: nothing is dropped. A unit of one token has nothing to predict. Where a
  window lies is arithmetic on token counts. Best-fit packing is in packing.py and best_fit.py.
- Members are columns of numbers, never objects: 52 bytes for a member of 4 MB, 13 MB for a terabyte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from megatrain.config import Packing
from megatrain.data.format import ShardSet
from megatrain.data.order import Int64

UNIT_SAMPLES = 256


@dataclass(frozen=True)
class Members:
    """All members of a set, in order.

    first_token: int64[members + 1], where each member begins in the row of all tokens; the last: their count.
    shard: int32[members]. documents: int64[members].
    tokens_offset, lengths_offset: int64[members], bytes in the tar. digest: uint8[members, 16], its xxh3-128.
    """

    first_token: Int64
    shard: npt.NDArray[np.int32]
    documents: Int64
    tokens_offset: Int64
    lengths_offset: Int64
    digest: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.shard)


def read_members(shards: ShardSet) -> Members:
    """Reads the indexes of all shards. Raises GaveUp if one was altered."""
    shard, columns, digests = [np.empty(0, np.int32)], [np.empty((4, 0), np.int64)], bytearray()
    for number in range(len(shards.manifest.shards)):
        members = shards.members(number)
        numbers = [(m.tokens, m.documents, m.tokens_offset, m.lengths_offset) for m in members]
        columns.append(np.array(numbers, np.int64).reshape(-1, 4).T)
        shard.append(np.full(len(members), number, np.int32))
        digests += bytes.fromhex("".join(m.xxh3_128 for m in members))
    tokens, documents, tokens_offset, lengths_offset = np.concatenate(columns, axis=1)
    return Members(
        first_token=np.concatenate([[0], np.cumsum(tokens)]),
        shard=np.concatenate(shard),
        documents=documents,
        tokens_offset=tokens_offset,
        lengths_offset=lengths_offset,
        digest=np.frombuffer(digests, np.uint8).reshape(-1, 16),
    )


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

    def __init__(self, members: Members, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        bounds = members.first_token[np.append(unit_starts(members, sequence_length), len(members))]
        self._begin, self._end = bounds[:-1], bounds[1:]
        windows = np.maximum(-((1 - np.diff(bounds)) // sequence_length), 0)  # ceil((tokens - 1) / S)
        self._first_sample = np.concatenate([[0], np.cumsum(windows)])
        self.samples = int(self._first_sample[-1])

    def locate(self, sample: Int64) -> Pieces:
        unit = np.searchsorted(self._first_sample, sample, side="right") - 1
        start = self._begin[unit] + (sample - self._first_sample[unit]) * self.sequence_length
        return Pieces(np.arange(len(sample)), start, np.minimum(start + self.sequence_length + 1, self._end[unit]))

    @property
    def padding_share(self) -> float:
        targets = int(np.maximum(self._end - self._begin - 1, 0).sum())
        return 1 - targets / (self.samples * self.sequence_length)


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
