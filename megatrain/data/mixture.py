"""Which source the n-th sample is from, and the how-many-eth of that source it is: a function of n alone. No torch.

Design choices:
- Sources are the leaves of a Huffman tree of their weights. A node gives its m-th sample to its left child where
  floor(m p + 1/2) is about to grow, p being the left child's part of the node's weight: a closed form, so any n costs
  the same. Along a path of a Huffman tree weights grow like Fibonacci numbers, so the rounding
  errors of the levels add up to less than 1.7 samples: at any prefix every source has its share within two samples.
- p is a fraction of 2^32 and all arithmetic is whole numbers: no rounding that depends on how large n is.
- A source at its limit leaves: from that sample on the others go by a tree of their own weights. There are at most as
  many such phases as sources, found once, by bisection.
- Here a source is an endless stream of samples; order.py says what its epochs are.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from megatrain.data.order import MAX_SIZE, Int64
from megatrain.errors import bad_value

UNIT = 1 << 32
_LOW = np.uint64(UNIT - 1)


@dataclass(frozen=True)
class Share:
    """What a source asks for: a weight relative to the others', the samples of an epoch, and epochs at most.

    weight: 0: it rests. used: samples that it has given before.
    """

    weight: float
    samples: int
    max_epochs: float | None = None
    used: int = 0

    @property
    def limit(self) -> int | None:
        """Samples that it may give, over the whole run at least one; None: without limit."""
        if self.max_epochs is None:
            return None
        return max(0, max(1, round(self.max_epochs * self.samples)) - self.used)


@dataclass(frozen=True)
class _Leaf:
    source: int


@dataclass(frozen=True)
class _Split:
    """A node: of its first m samples, (m * part + UNIT / 2) // UNIT go to the left child."""

    part: int
    left: _Split | _Leaf
    right: _Split | _Leaf


@dataclass(frozen=True)
class _Phase:
    """From sample `first` on, the sources in `tree` share; source i has given used[i] samples before."""

    first: int
    used: tuple[int, ...]
    tree: _Split | _Leaf


class Mixture:
    """Several streams dealt out by weight.

    shares: by source name; sources are numbered in this order.
    total_samples: when all sources are used up; None: never.
    Raises InputError naming data.sources.NAME.weight that is below 0, or if all are; or max_epochs not above 0.
    """

    def __init__(self, shares: Mapping[str, Share]) -> None:
        for name, share in shares.items():
            if not (math.isfinite(share.weight) and share.weight >= 0):
                raise bad_value(f"data.sources.{name}.weight", share.weight, "must be a number of 0 or more")
            epochs = share.max_epochs
            if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
                raise bad_value(f"data.sources.{name}.max_epochs", epochs, "must be a number above 0")
        if not any(share.weight for share in shares.values()):
            raise bad_value(f"data.sources.{next(iter(shares))}.weight", 0, "one source has to have a weight above 0")
        self._sources = len(shares)
        self._phases, self.total_samples = _phases(list(shares.values()))
        self._firsts = np.array([phase.first for phase in self._phases])

    def locate(self, n: Int64) -> tuple[npt.NDArray[np.int32], Int64]:
        """The source of samples `n` (int64[any], below total_samples) and their places in that source's stream."""
        source = np.zeros(n.shape, np.int32)
        place = np.zeros(n.shape, np.int64)
        phase_of = np.searchsorted(self._firsts, n, side="right") - 1
        for number in np.unique(phase_of):
            phase = self._phases[number]
            chosen = np.flatnonzero(phase_of == number)
            _descend(phase.tree, (n[chosen] - phase.first).astype(np.uint64), chosen, source, place)
            place[chosen] += np.array(phase.used)[source[chosen]]
        return source, place

    def given(self, m: int) -> list[int]:
        """How many of the first m samples each source gives."""
        if not self._phases:
            return [0] * self._sources
        phase = [phase for phase in self._phases if phase.first <= m][-1]
        given = list(phase.used)
        for source, samples in _counts(phase.tree, m - phase.first):
            given[source] += samples
        return given


def _phases(shares: list[Share]) -> tuple[list[_Phase], int | None]:
    """The phases, and the sample at which all sources are used up."""
    first, used = 0, [0] * len(shares)
    phases: list[_Phase] = []
    while active := [s for s, share in enumerate(shares) if share.weight and used[s] != share.limit]:
        tree = _huffman({source: shares[source].weight for source in active})
        phases.append(_Phase(first, tuple(used), tree))
        left = {source: limit - used[source] for source in active if (limit := shares[source].limit) is not None}
        length = _first_at_limit(tree, left)
        if length is None:
            return phases, None
        first += length
        for source, given in _counts(tree, length):
            used[source] += given
    return phases, first


def _first_at_limit(tree: _Split | _Leaf, left: dict[int, int]) -> int | None:
    """The smallest number of samples after which a source has given all that it has `left`; None: never."""

    def reached(m: int) -> bool:
        return any(given >= left.get(source, MAX_SIZE) for source, given in _counts(tree, m))

    length = bisect_left(range(MAX_SIZE), True, key=reached)
    return None if length == MAX_SIZE else length


def _huffman(weights: dict[int, float]) -> _Split | _Leaf:
    """The Huffman tree of sources by weight."""
    order = count()  # settles ties, so that the tree is the same everywhere
    heap: list[tuple[float, int, _Split | _Leaf]] = [(w, next(order), _Leaf(source)) for source, w in weights.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (light, _, right), (heavy, _, left) = heapq.heappop(heap), heapq.heappop(heap)
        part = min(max(round(heavy / (heavy + light) * UNIT), 1), UNIT - 1)
        heapq.heappush(heap, (heavy + light, next(order), _Split(part, left, right)))
    return heap[0][2]


def _descend(
    node: _Split | _Leaf,
    m: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.intp],
    source: npt.NDArray[np.int32],
    place: Int64,
) -> None:
    """Writes, for the node's samples `m`, their source and their place in it into `rows` of source and place."""
    if isinstance(node, _Leaf):
        source[rows], place[rows] = node.source, m
        return
    before = _left_count(m, node.part)
    left = _left_count(m + np.uint64(1), node.part) > before
    _descend(node.left, before[left], rows[left], source, place)
    _descend(node.right, (m - before)[~left], rows[~left], source, place)


def _left_count(m: npt.NDArray[np.uint64], part: int) -> npt.NDArray[np.uint64]:
    """(m * part + UNIT / 2) // UNIT, in two halves so that the product stays within 64 bits."""
    low = (m & _LOW) * np.uint64(part) + np.uint64(UNIT // 2)
    return (m >> np.uint64(32)) * np.uint64(part) + (low >> np.uint64(32))


def _counts(node: _Split | _Leaf, m: int) -> list[tuple[int, int]]:
    """How many of the node's first m samples each source below it gives."""
    if isinstance(node, _Leaf):
        return [(node.source, m)]
    left = (m * node.part + UNIT // 2) // UNIT
    return _counts(node.left, left) + _counts(node.right, m - left)
