"""Best-fit packing: documents into samples of S + 1 ids without cutting those that fit. No torch.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3: only documents longer than a sample are cut,
and pieces go by best-fit decreasing into the sample whose room they fill best.

Design choices:
- A document of more than S + 1 ids is cut as concat windows are: pieces advance by S and overlap in one id, the last id
  of a piece being the first of the next. So each id of a document but its first is predicted once.
- A sample's pieces stand in the order of the set, not of their size: where in a sample a text stands says nothing of
  how long it is.
- Rooms are whole numbers up to S, so the smallest room that is large enough is the lowest set bit of one integer: about
  a microsecond a piece, with nothing but the standard library.
- Among samples with the same room the first one takes the piece: the packing has one definition (docs/data.md).
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from megatrain.data.order import Int64

Words = npt.NDArray[np.uint32]

WORD = np.dtype("<u4")
SHORTEST = 2
"""Ids of the shortest piece: with fewer there is nothing to predict."""


def pack_unit(lengths: Int64, sequence_length: int) -> tuple[Words, int, int]:
    """The samples of a pack unit, from the lengths of its documents, int64[documents], at least 1.

    Returns the unit's block, and how many samples and pieces it has. The block is uint32[samples + 2 * pieces]: for
    each sample the number of pieces up to its end; for each piece, by sample, where in the unit it begins; its ids.
    """
    start, size = cut(lengths, sequence_length)
    sample = best_fit(size, sequence_length + 1)
    by_sample = np.argsort(sample, kind="stable")
    ends = np.cumsum(np.bincount(sample))
    return np.concatenate([ends, start[by_sample], size[by_sample]]).astype(WORD), len(ends), len(size)


def cut(lengths: Int64, sequence_length: int) -> tuple[Int64, Int64]:
    """The pieces of documents that stand one after the other: where each begins and its ids, both int64[pieces].

    A piece has 2 to S + 1 ids. A document of one id has none.
    """
    counts = (lengths - 2) // sequence_length + 1  # ceil((length - 1) / S)
    document = np.repeat(np.arange(len(lengths)), counts)
    skipped = (np.arange(len(document)) - (np.cumsum(counts) - counts)[document]) * sequence_length
    start = (np.cumsum(lengths) - lengths)[document] + skipped
    return start, np.minimum(lengths[document] - skipped, sequence_length + 1)


def best_fit(size: Int64, capacity: int) -> Int64:
    """The sample of each piece, int64[pieces], counted from 0 in the order in which samples are begun.

    size: int64[pieces], each 2 to `capacity`. Pieces go by size, the largest first, equal ones in their order, to the
    sample with the least room that is enough, of equal ones to the first; where there is none, to a new one.
    """
    order = np.argsort(-size, kind="stable")
    full = int(np.count_nonzero(size == capacity))
    chosen = list(range(full))
    begun = full
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # heaps of samples, by their room
    rooms = 0  # bit r: with_room[r] isn't empty
    for ids in size[order[full:]].tolist():
        enough = rooms >> ids
        if enough:
            room = ids + (enough & -enough).bit_length() - 1
            sample = heappop(with_room[room])
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sample = capacity, begun
            begun += 1
        chosen.append(sample)
        room -= ids
        if room >= SHORTEST:
            heappush(with_room[room], sample)
            rooms |= 1 << room
    result = np.empty(len(size), np.int64)
    result[order] = chosen
    return result
