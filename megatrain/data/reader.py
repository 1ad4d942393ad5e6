"""Ids and document starts of a range of a set's tokens, and what becomes of bad members. No torch.

Design choices:
- Local tars are mapped, not read: the page cache is the only copy, shared by the ranks of a node. Members of a remote
  set (remote.py) are files in a cache, mapped likewise.
- A member is hashed when it is first touched. One whose bytes aren't those that were written is bad: it ends the run,
  by name, or is skipped where that was asked for. Whether it is bad lies in the file alone, so all ranks do alike.
  What can't be read at all is never skipped: with a mount that is gone all samples would be.
- Document starts come from `.lengths`, not from looking for EOS: an id inside a text may be anything.
- A step's ranges are read together: numpy is called for all of them, and what is done for each copies bytes. No view of
  a map outlives a call.
- Memory is bounded whatever the set's size: so many maps (each holds a file open), so many bytes of document starts.
- Safe to use from several threads: the caches are lru_cache's, and to verify a member twice changes nothing.
"""

from __future__ import annotations

import logging
import mmap
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatrain.data.format import LENGTH_DTYPE, ShardSet, member_digest
from megatrain.data.order import Int64
from megatrain.data.sequences import Members
from megatrain.errors import GaveUp

log = logging.getLogger(__name__)

OPEN_SHARDS = 256
STARTS_BYTES = 32 << 20
"""How much of document starts one reader keeps."""
ALTERED = "was altered since it was written (xxh3-128 differs)"
CUT_OFF = "lies beyond the end of the tar, which was cut off"

Int32 = npt.NDArray[np.int32]


class BadMember(GaveUp):
    """A member's bytes aren't those that were written. Names shard and member."""


def bad_member(shards: ShardSet, members: Members, member: int, what: str) -> BadMember:
    """The error for a member; what: ALTERED or CUT_OFF."""
    shard = int(members.shard[member])
    place = member - int(members.shard.searchsorted(shard))
    return BadMember(f"{shards.where(shard)}: member {shards.members(shard)[place].name} {what}")


class Payloads(Protocol):
    """Where the bytes of a set's members are. Methods may be called on any thread.

    They raise BadMember for a bad member, and GaveUp where one can't be read.
    """

    def fetch(self, members: npt.NDArray[np.intp]) -> None:
        """Says that these are read next. Raises no BadMember."""

    def verify(self, member: int) -> None:
        """Hashes a member. Raises BadMember."""

    def place(self, member: int) -> tuple[mmap.mmap, int, int]:
        """A map that holds the member, and where in it, in bytes, its tokens and its lengths begin."""


class Reader:
    """Reads one set; `members` is read_members(shards).

    payloads: TarMaps of them unless given. skip: bad members are noted and passed over, instead of raised.
    """

    def __init__(
        self, shards: ShardSet, members: Members, payloads: Payloads | None = None, skip: bool = False
    ) -> None:
        self._members = members
        self.id_dtype = shards.id_dtype
        self._payloads = payloads or TarMaps(shards, members)
        self._skip = skip
        self._verified = np.zeros(len(members), np.bool_)
        self._bad: set[int] = set()
        self._unreported: list[str] = []
        largest = max(1, members.most_documents) * np.dtype(np.int64).itemsize
        self._starts = lru_cache(maxsize=max(1, STARTS_BYTES // largest))(self._read_starts)

    def read(
        self, start: Int64, stop: Int64, to: Int64, ids: npt.NDArray[Any], documents: bool = True
    ) -> tuple[npt.NDArray[np.bool_], Int64]:
        """Writes the ids of tokens [start[i], stop[i]) of the set to ids[to[i]:], for each i.

        start, stop, to: int64[ranges]. ids: of id_dtype, one dimension. documents: whether to say where they begin.
        Returns which ranges are usable, bool[ranges], and at which places of `ids` documents begin, int64[any]. A range
        that a skipped bad member has a part of isn't usable: what was written and is said of it means nothing.
        Raises GaveUp, naming shard and member, if what is read was altered since it was written, or can't be read.
        """
        first_token = self._members.first_token
        first = first_token.searchsorted(start, side="right") - 1
        parts = first_token.searchsorted(stop) - first
        of = np.repeat(np.arange(len(start)), parts)  # the range of each part, which is of one member
        member = np.arange(len(of)) + (first + parts - np.cumsum(parts))[of]
        self._verify(np.unique(member))
        good = self._verified[member]
        usable = np.ones(len(start), np.bool_)
        usable[of[~good]] = False
        of, member = of[good], member[good]
        origin = first_token[member]
        begin, end = np.maximum(start[of], origin), np.minimum(stop[of], first_token[member + 1])
        to = to[of] + begin - start[of]
        begin, end, numbers = begin - origin, end - origin, member.tolist()
        self._copy(numbers, begin, end, to, ids)
        return usable, self._begins(numbers, begin, end, to) if documents else np.empty(0, np.int64)

    def _copy(self, members: list[int], begin: Int64, end: Int64, to: Int64, ids: npt.NDArray[Any]) -> None:
        """Writes tokens [begin[i], end[i]) of members[i] to ids[to[i]:], for each i."""
        # Bytes between memoryviews: for two thousand ids at a time half of what it takes between arrays.
        out, size = ids.view(np.uint8).data, ids.itemsize
        bounds = ((begin * size).tolist(), (end * size).tolist(), (to * size).tolist())
        for member, first, last, place in zip(members, *bounds, strict=True):
            mapped, tokens, _ = self._payloads.place(member)
            out[place : place + last - first] = memoryview(mapped)[tokens + first : tokens + last]

    def _begins(self, members: list[int], begin: Int64, end: Int64, to: Int64) -> Int64:
        """Where documents begin among what _copy writes: int64[any]."""
        found = [np.empty(0, np.int64)]
        for member, bounds in zip(members, np.stack((begin, end), axis=1), strict=True):
            starts = self._starts(member)
            low, high = starts.searchsorted(bounds).tolist()
            found.append(starts[low:high])
        counts = [len(starts) for starts in found[1:]]
        return np.concatenate(found) + np.repeat(to - begin, counts)

    def take_bad(self) -> list[str]:
        """The bad members that were skipped and not taken yet, a line each: shard, member, and what is wrong."""
        taken, self._unreported = self._unreported, []
        return taken

    def _verify(self, members: npt.NDArray[np.intp]) -> None:
        """Has the members at hand, and hashes those that weren't yet. Raises BadMember, unless they are skipped."""
        self._payloads.fetch(members)
        for member in members[~self._verified[members]].tolist():
            if member in self._bad:
                continue
            try:
                self._payloads.verify(member)
            except BadMember as error:
                if not self._skip:
                    raise BadMember(f"{error}; data.bad_member=skip would pass over it") from None
                self._bad.add(member)
                self._unreported.append(str(error))
                log.warning("%s; its samples are skipped", error)
            else:
                self._verified[member] = True

    def starts(self, member: int) -> Int64:
        """Where in a member, counted from its first token, its documents begin: int64[documents], ascending."""
        return self._starts(member)

    def _read_starts(self, member: int) -> Int64:
        """Where in the member each of its documents begins: int64[documents]."""
        mapped, _, begin = self._payloads.place(member)
        lengths = np.frombuffer(mapped, LENGTH_DTYPE, self._members.documents[member], begin).astype(np.int64)
        return np.cumsum(lengths) - lengths


class TarMaps(Payloads):
    """The payloads of a local set's members: maps of its tars."""

    def __init__(self, shards: ShardSet, members: Members) -> None:
        self._shards = shards
        self._members = members
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def fetch(self, members: npt.NDArray[np.intp]) -> None:
        """Nothing: the system reads ahead."""

    def verify(self, member: int) -> None:
        """Hashes the member where it lies. Raises BadMember."""
        m, shard = self._members, int(self._members.shard[member])
        lengths_begin = int(m.lengths_offset[member])
        lengths_end = lengths_begin + int(m.documents[member]) * LENGTH_DTYPE.itemsize
        if lengths_end > self._shards.damaged.get(shard, lengths_end):
            raise bad_member(self._shards, m, member, CUT_OFF)
        tokens = int(m.first_token[member + 1] - m.first_token[member])
        begin = int(m.tokens_offset[member])
        view = memoryview(self._map(shard))
        digest = member_digest(
            view[begin : begin + tokens * self._shards.id_dtype.itemsize], view[lengths_begin:lengths_end]
        )
        if digest != m.digest[member].tobytes().hex():
            raise bad_member(self._shards, m, member, ALTERED)

    def place(self, member: int) -> tuple[mmap.mmap, int, int]:
        """The map of the member's tar."""
        m = self._members
        return self._map(int(m.shard[member])), int(m.tokens_offset[member]), int(m.lengths_offset[member])

    def _open(self, shard: int) -> mmap.mmap:
        path = self._shards.path(shard)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise GaveUp(f"{path}: can't be read: {error}") from None
        expected = self._shards.damaged.get(shard, self._shards.manifest.shards[shard].bytes)
        if len(mapped) != expected:
            raise GaveUp(f"{path}: has {len(mapped)} bytes, and had {expected} when the set was opened")
        return mapped
