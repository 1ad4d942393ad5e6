"""Where members and shards end: arithmetic on the lengths of all documents of a split, before a shard is written.

Design choices:
- Both are filled greedily in the order of the documents, so where they end depends on that order alone: not on units,
  workers or executors. Known beforehand, shards can be written in any order, by anyone.
- Lengths come unit by unit; what is kept is a number a member and a piece a unit and shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatrain.data.format import LENGTH_DTYPE
from megatrain.data_prep.shards.writer import EMPTY_TAR_BYTES, member_bytes

Lengths = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Part:
    """Documents of one unit that lie in one shard: [first, first + documents). folder: where the unit's results are."""

    folder: str
    first: int
    documents: int


@dataclass(frozen=True)
class Cut:
    """A shard: its documents by unit, in order, how many each member has, and the tokens of all."""

    parts: tuple[Part, ...]
    members: tuple[int, ...]
    tokens: int


def cut(lengths: Iterable[tuple[str, Lengths]], id_bytes: int, most_member: int, most_shard: int) -> Iterator[Cut]:
    """The shards of a split.

    lengths: the folders of units, in order, with the tokens of each document, uint32[documents]. id_bytes: of an id.
    most_member: bytes of a member's tokens, unless one document is larger. most_shard: of a tar, unless one member is
    larger.
    """
    seen: list[tuple[str, int]] = []  # units with documents that aren't in a shard yet, and how many
    taken = 0  # of the first of them

    def watched() -> Iterator[Lengths]:
        for folder, own in lengths:
            if len(own):
                seen.append((folder, len(own)))
            yield own

    for members in _shards(_members(watched(), most_member // id_bytes), id_bytes, most_shard):
        parts, wanted = [], sum(documents for documents, _ in members)
        while wanted:
            folder, documents = seen[0]
            here = min(wanted, documents - taken)
            parts.append(Part(folder, taken, here))
            wanted, taken = wanted - here, taken + here
            if taken == documents:
                seen.pop(0)
                taken = 0
        yield Cut(tuple(parts), tuple(documents for documents, _ in members), sum(tokens for _, tokens in members))


def _members(lengths: Iterable[Lengths], most_tokens: int) -> Iterator[tuple[int, int]]:
    """Documents and tokens of each member."""
    documents = tokens = 0
    for own in lengths:
        ends = np.concatenate([[0], np.cumsum(own, dtype=np.int64)])
        first = 0
        while first < len(own):
            last = max(first, int(np.searchsorted(ends, ends[first] + most_tokens - tokens, side="right")) - 1)
            if last == first and not documents:
                last += 1  # larger than a member
            documents, tokens = documents + last - first, tokens + int(ends[last] - ends[first])
            if last < len(own):
                yield documents, tokens
                documents = tokens = 0
            first = last
    if documents:
        yield documents, tokens


def _shards(members: Iterable[tuple[int, int]], id_bytes: int, most_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """Documents and tokens of each member, shard by shard."""
    size, found = EMPTY_TAR_BYTES, list[tuple[int, int]]()
    for documents, tokens in members:
        more = member_bytes(tokens * id_bytes, documents * LENGTH_DTYPE.itemsize)
        if found and size + more > most_bytes:
            yield found
            size, found = EMPTY_TAR_BYTES, []
        size += more
        found.append((documents, tokens))
    if found:
        yield found
