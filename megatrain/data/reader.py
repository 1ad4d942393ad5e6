"""Ids and document starts of a range of a set's tokens, from the mapped tars. No torch.

Design choices:
- Tars are mapped, not read: the page cache is the only copy, shared by the ranks of a node.
- A member is hashed when it is first touched and never again by this reader. An altered one ends the run: it is
  named, not passed over.
- Document starts come from `.lengths`, not from looking for EOS: an id inside a text may be anything.
- Memory is bounded whatever the set's size: so many maps (each holds a file open), so many bytes of document starts.
- Safe to use from several threads: the caches are lru_cache's, and to verify a member twice changes nothing.
"""

from __future__ import annotations

import mmap
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data.format import LENGTH_DTYPE, ShardSet, member_digest
from megatrain.data.order import Int64
from megatrain.data.sequences import Members
from megatrain.errors import GaveUp

OPEN_SHARDS = 256
STARTS_BYTES = 32 << 20
"""How much of document starts one reader keeps."""

Int32 = npt.NDArray[np.int32]


class Reader:
    """Reads one set; `members` is read_members(shards)."""

    def __init__(self, shards: ShardSet, members: Members) -> None:
        self._shards = shards
        self._members = members
        self._verified = np.zeros(len(members), np.bool_)
        largest = int(members.documents.max(initial=1)) * np.dtype(np.int64).itemsize
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open)
        self._starts = lru_cache(maxsize=max(1, STARTS_BYTES // largest))(self._read_starts)

    def read(self, start: int, stop: int, ids: Int32, document: Int32) -> None:
        """Writes the ids of tokens [start, stop) of the set to the front of `ids`.

        ids, document: int32[at least stop - start]. Where a document begins at place i, document[i] = i is written;
        the rest of `document` is left as it is.
        Raises GaveUp, naming shard and member, if what is read was altered since it was written.
        """
        first_token = self._members.first_token
        member = int(first_token.searchsorted(start, side="right")) - 1
        at = start
        while at < stop:
            begin, end = int(first_token[member]), min(stop, int(first_token[member + 1]))
            if not self._verified[member]:
                self._verify(member)
            ids[at - start : end - start] = self._tokens(member)[at - begin : end - begin]
            starts = self._starts(member)
            low, high = starts.searchsorted((at - begin, end - begin))
            places = starts[low:high] + (begin - start)
            document[places] = places
            at, member = end, member + 1

    def starts(self, member: int) -> Int64:
        """Where in a member, counted from its first token, its documents begin: int64[documents], ascending."""
        return self._starts(member)

    def _tokens(self, member: int) -> npt.NDArray[Any]:
        """The stored ids of a member, a view of the map."""
        m = self._members
        tokens = int(m.first_token[member + 1] - m.first_token[member])
        return np.frombuffer(self._map(m.shard[member]), self._shards.id_dtype, tokens, m.tokens_offset[member])

    def _lengths(self, member: int) -> npt.NDArray[np.uint32]:
        """The stored lengths of a member's documents, a view of the map."""
        m = self._members
        return np.frombuffer(self._map(m.shard[member]), LENGTH_DTYPE, m.documents[member], m.lengths_offset[member])

    def _read_starts(self, member: int) -> Int64:
        """Where in the member each of its documents begins: int64[documents]."""
        lengths = self._lengths(member).astype(np.int64)
        return np.cumsum(lengths) - lengths

    def _verify(self, member: int) -> None:
        digest = member_digest(self._tokens(member).data, self._lengths(member).data)
        if digest != self._members.digest[member].tobytes().hex():
            shard = int(self._members.shard[member])
            place = member - int(self._members.shard.searchsorted(shard))
            name = self._shards.members(shard)[place].name
            raise GaveUp(
                f"{self._shards.path(shard)}: member {name} was altered since it was written (xxh3-128 differs)"
            )
        self._verified[member] = True

    def _open(self, shard: int) -> mmap.mmap:
        path = self._shards.path(shard)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise GaveUp(f"{path}: can't be read: {error}") from None
        if len(mapped) != self._shards.manifest.shards[shard].bytes:
            raise GaveUp(f"{path}: has {len(mapped)} bytes, not those that the manifest was written with")
        return mapped
