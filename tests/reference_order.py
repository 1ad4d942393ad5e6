"""Law 2 once more, slowly: sample n of a mixture in plain Python integers, written from docs/data.md alone.

Design choices:
- Nothing of megatrain and no numpy. Documents are lists of ids; what a closed form finds is looked for one by one:
  where a source is used up by counting samples, a sample's unit by going through all units.
- A packing is a function from a unit's documents and S to its samples; PACKINGS has them by name.
- ReferenceOrder is one segment; ReferenceRun walks through a run step by step, and begins another where something
  changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import isqrt

import xxhash

Tree = str | tuple[int, "Tree", "Tree"]
"""A name, or the left child's part times 2^32 and the two children."""
Documents = Sequence[Sequence[int]]
"""Documents as their ids, EOS included."""
WORD = 1 << 64
UNIT_SAMPLES = 256


@dataclass(frozen=True)
class ReferenceSource:
    """A source: shards of members of documents. max_epochs None: without limit."""

    shards: Sequence[Sequence[Documents]]
    weight: float = 1.0
    max_epochs: float | None = None


@dataclass(frozen=True)
class Cut:
    """A sample of a pack unit: its ids, at most S + 1, and where in it a document begins (place 0 apart)."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class ReferenceSample:
    """Sample n. ids: S + 1, padded with EOS. document: for each id, where its document begins; padding is one."""

    source: str
    number: int
    ids: tuple[int, ...]
    document: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Begun:
    """Where a source is when a segment's mixture begins: which permutation, its place in it, and the epochs before."""

    permutation: int = 0
    place: int = 0
    epochs: float = 0.0


class ReferenceOrder:
    """The samples of a segment whose mixture deals from sample `first` on. begun: of sources that were there before."""

    def __init__(
        self,
        sources: Mapping[str, ReferenceSource],
        seed: int,
        sequence_length: int,
        *,
        eos: int = 0,
        packing: str = "concat",
        shuffle_block: int | None = None,
        shuffle_blocks: int = 64,
        first: int = 0,
        begun: Mapping[str, Begun] | None = None,
        cuts: dict[int, list[list[Cut]]] | None = None,
    ) -> None:
        self.sources = dict(sorted(sources.items()))
        self.seed, self.length, self.eos = seed, sequence_length, eos
        self.packing, self.block, self.blocks = packing, shuffle_block, shuffle_blocks
        self.first = first
        self.begun = {name: (begun or {}).get(name, Begun()) for name in self.sources}
        self._cuts: dict[int, list[list[Cut]]] = {} if cuts is None else cuts
        self._cut = PACKINGS[packing]
        self.samples = {name: sum(map(len, self._units(name))) for name in self.sources}

    def sample(self, n: int) -> ReferenceSample:
        """Sample n. Raises IndexError where all sources are used up before it."""
        name, place = self._mixture(n)
        number = self._shuffled(name, place)
        left = number
        for unit in self._units(name):
            if left < len(unit):
                cut = unit[left]
                break
            left -= len(unit)
        padding = self.length + 1 - len(cut.ids)
        begins = {0, *cut.starts} | ({len(cut.ids)} if padding else set())
        document = tuple(max(start for start in begins if start <= at) for at in range(self.length + 1))
        return ReferenceSample(name, number, cut.ids + (self.eos,) * padding, document, len(cut.ids))

    def batch_digest(self, first: int, samples: int) -> int:
        """batch_digest of samples first, first + 1, ..."""
        digest = 0
        for n in range(first, first + samples):
            data = b"".join(id_.to_bytes(4, "little") for id_ in self.sample(n).ids)
            digest += xxhash.xxh3_64(data, seed=n).intdigest()
        return digest % WORD

    def _mixture(self, n: int) -> tuple[str, int]:
        """The source of sample n, and its place in the source's stream."""
        given, tree, m = self._dealt(n - self.first)
        if tree is None:
            raise IndexError(n)
        before, after = counts(tree, m), counts(tree, m + 1)
        (name,) = (name for name in after if after[name] > before[name])
        return name, self.begun[name].place + given[name] + before[name]

    def given(self, m: int) -> dict[str, int]:
        """How many of the first m samples from `first` on each source gives."""
        given, tree, m = self._dealt(m)
        more = {} if tree is None else counts(tree, m)
        return {name: count + more.get(name, 0) for name, count in given.items()}

    def _dealt(self, m: int) -> tuple[dict[str, int], Tree | None, int]:
        """What each source had given when the last one before sample m was used up, the tree from there on (None: all
        were), and how far behind it m is."""
        limits = {name: limit for name in self.sources if (limit := self._limit(name)) is not None}
        given = dict.fromkeys(self.sources, 0)
        while alive := [
            name for name, source in self.sources.items() if source.weight and given[name] != limits.get(name)
        ]:
            tree = huffman({name: self.sources[name].weight for name in alive})
            limited = [name for name in alive if name in limits]
            length = 0 if limited else m + 1
            while length <= m and all(given[name] + counts(tree, length)[name] < limits[name] for name in limited):
                length += 1
            if m < length:
                return given, tree, m
            m -= length
            for name, more in counts(tree, length).items():
                given[name] += more
        return given, None, m

    def _limit(self, name: str) -> int | None:
        """How many samples the source may give in the segment."""
        max_epochs, size, begun = self.sources[name].max_epochs, self.samples[name], self.begun[name]
        if max_epochs is None:
            return None
        return max(0, max(1, round(max_epochs * size)) - begun.place - round(begun.epochs * size))

    def _shuffled(self, name: str, place: int) -> int:
        """The sample at a place of the source's stream."""
        size = self.samples[name]
        text = json.dumps([self.seed, name, self.begun[name].permutation]).encode()
        key = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
        epoch, p = divmod(place, size)
        epoch_key = mix(mix(epoch) ^ key)
        if self.block is None:
            return permute(p, size, epoch_key)
        window = self.block * self.blocks
        w = p // window
        q = w * window + permute(p % window, min(window, size - w * window), mix(epoch_key ^ mix(w + 1)))
        whole = size // self.block
        if q < whole * self.block:
            q = permute(q // self.block, whole, epoch_key) * self.block + q % self.block
        return (q + mix(epoch_key) % size) % size

    def _units(self, name: str) -> Iterator[list[Cut]]:
        """The samples of each unit of a source, unit by unit; those of equal (the same) shards are cut once."""
        for shard in self.sources[name].shards:
            if id(shard) not in self._cuts:
                self._cuts[id(shard)] = [self._cut(unit, self.length) for unit in units(shard, self.length)]
            yield from self._cuts[id(shard)]


@dataclass(frozen=True)
class Asked:
    """What is asked for at a step."""

    sources: Mapping[str, ReferenceSource]
    sequence_length: int
    global_batch_size: int
    packing: str = "concat"
    shuffle_block: int | None = None
    shuffle_blocks: int = 64


class ReferenceRun:
    """A run from sample 0 on. n: the next sample. order: the segment it is in."""

    def __init__(self, asked: Asked, seed: int, *, eos: int = 0, pass_over: Sequence[tuple[int, int]] = ()) -> None:
        self.n, self.seed, self.eos, self.pass_over = 0, seed, eos, pass_over
        self._cuts: dict[tuple[int, str], dict[int, list[list[Cut]]]] = {}  # Cutting is most of the work.
        self.order, self._asked = self._order(asked, {}), asked

    def change(self, asked: Asked) -> None:
        """Asks for something else from sample n on."""
        before, self._asked = self._asked, asked
        if replace(asked, global_batch_size=before.global_batch_size) == before:
            return
        given = self.order.given(self.n - self.order.first)
        cut_alike = (asked.sequence_length, asked.packing) == (before.sequence_length, before.packing)
        blocks_alike = (asked.shuffle_block, asked.shuffle_blocks) == (before.shuffle_block, before.shuffle_blocks)
        begun = {}
        for name in asked.sources.keys() & before.sources.keys():
            old = self.order.begun[name]
            place = old.place + given[name]
            if cut_alike and blocks_alike and asked.sources[name].shards == before.sources[name].shards:
                begun[name] = replace(old, place=place)
            else:
                begun[name] = Begun(old.permutation + 1, 0, old.epochs + place / self.order.samples[name])
        self.order = self._order(asked, begun)

    def step(self) -> tuple[int, int] | None:
        """The first sample of the next step, which is trained, and its batch_digest; None: the data are used up."""
        size = self._asked.global_batch_size
        while touched := [last for first, last in self.pass_over if first < self.n + size and last >= self.n]:
            self.n = max(touched) + 1
        first, samples = self.n, size
        while samples and not self._holds(first + samples - 1):
            samples -= 1
        self.n += samples
        return (first, self.order.batch_digest(first, samples)) if samples else None

    def _holds(self, n: int) -> bool:
        try:
            self.order.sample(n)
        except IndexError:
            return False
        return True

    def _order(self, asked: Asked, begun: Mapping[str, Begun]) -> ReferenceOrder:
        return ReferenceOrder(
            asked.sources,
            self.seed,
            asked.sequence_length,
            eos=self.eos,
            packing=asked.packing,
            shuffle_block=asked.shuffle_block,
            shuffle_blocks=asked.shuffle_blocks,
            first=self.n,
            begun=begun,
            cuts=self._cuts.setdefault((asked.sequence_length, asked.packing), {}),
        )


def units(shard: Sequence[Documents], length: int) -> Iterator[Documents]:
    """The documents of each pack unit of a shard."""
    unit: list[Sequence[int]] = []
    for member in shard:
        unit += member
        if len(concat(unit, length)) >= UNIT_SAMPLES:
            yield unit
            unit = []
    yield unit


def concat(unit: Documents, length: int) -> list[Cut]:
    """All ids of the unit in a row, cut every S ids, with one id more that the next sample begins with."""
    row = [id_ for document in unit for id_ in document]
    starts = [sum(len(document) for document in unit[:number]) for number in range(len(unit))]
    return [
        Cut(
            tuple(row[at : at + length + 1]),
            tuple(start - at for start in starts if at < start < at + len(row[at : at + length + 1])),
        )
        for at in range(0, len(row) - 1, length)
    ]


def best_fit(unit: Documents, length: int) -> list[Cut]:
    """Documents, cut every S ids only where they are longer than S + 1, the largest piece first into the fullest sample
    that has room for it."""
    pieces = [document[at : at + length + 1] for document in unit for at in range(0, len(document) - 1, length)]
    samples: list[list[int]] = []
    for number in sorted(range(len(pieces)), key=lambda number: -len(pieces[number])):
        rooms = [length + 1 - sum(len(pieces[each]) for each in sample) for sample in samples]
        enough = [room for room in rooms if room >= len(pieces[number])]
        if enough:
            samples[rooms.index(min(enough))].append(number)
        else:
            samples.append([number])
    cuts = []
    for sample in map(sorted, samples):
        ends = [sum(len(pieces[each]) for each in sample[: at + 1]) for at in range(len(sample))]
        cuts.append(Cut(tuple(id_ for each in sample for id_ in pieces[each]), tuple(ends[:-1])))
    return cuts


PACKINGS = {"concat": concat, "best_fit": best_fit}


def huffman(weights: Mapping[str, float]) -> Tree:
    """The Huffman tree: the two lightest nodes are joined, those made first of equals, the heavier one to the left."""
    nodes: list[tuple[float, Tree]] = [(weight, name) for name, weight in weights.items()]
    while len(nodes) > 1:
        light = min(nodes, key=lambda node: node[0])
        nodes.remove(light)
        heavy = min(nodes, key=lambda node: node[0])
        nodes.remove(heavy)
        part = round(heavy[0] / (heavy[0] + light[0]) * 2**32)
        nodes.append((heavy[0] + light[0], (min(max(part, 1), 2**32 - 1), heavy[1], light[1])))
    return nodes[0][1]


def counts(tree: Tree, m: int) -> dict[str, int]:
    """How many of a tree's first m samples each name has."""
    if isinstance(tree, str):
        return {tree: m}
    part, left, right = tree
    of_left = (2 * m * part + 2**32) // 2**33  # floor(m p + 1/2)
    return counts(left, of_left) | counts(right, m - of_left)


def permute(index: int, size: int, key: int) -> int:
    """The image of index in [0, size)."""
    rows = isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for t in range(1, 17):
            k = (key + t * 0x9E3779B97F4A7C15) % WORD
            if t % 2:
                row = (row + below(rows, column ^ k)) % rows
            else:
                column = (column + below(columns, row ^ k)) % columns
        index = row * columns + column
        if index < size:
            return index


def below(limit: int, x: int) -> int:
    return (mix(x) >> 32) * limit >> 32


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31
