"""Law 2: sample n as a function of the sets, the mixture, the sequence length, the seed and n. No torch.

Design choices:
- The three closed forms meet here: mixture.py says which source and which of its places, order.py which sample the
  place holds in that epoch, sequences.py where the sample lies. Nothing remembers what came before, so to start at any
  n is to start.
- data.path=DIR is data.sources.data.path=DIR. Sources are numbered by name, so their order in a file means nothing.
- The held-out split has no shuffle and no epochs: the first samples of each source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatrain.data.best_fit import open_best_fit
from megatrain.data.cache import Cache
from megatrain.data.format import TRAIN, Manifest, ShardSet, open_set
from megatrain.data.order import EVERYWHERE, Int64, Shuffle, shuffled, source_key
from megatrain.data.reader import Int32, Reader
from megatrain.data.remote import RemoteMembers, open_remote
from megatrain.data.segments import Part, Segment, first_segment, mixture_of
from megatrain.data.sequences import Members, SequenceIndex, open_concat, read_members
from megatrain.data_config import DataConfig, Packing, SourceConfig, WhenBad
from megatrain.errors import InputError, bad_value
from megatrain.storage import URL

EMPTY = -1
"""In place of a sample's number: an empty sample."""
LOCATED_AT_ONCE = 4096
"""Samples, at least. To find a few costs as much as to find a thousand: the calls of numpy, not what they do."""


@dataclass(frozen=True)
class Source:
    """One open set of a mixture.

    `config` is its own; `shards` is the set; `index` says where its samples lie among its members, and
    `cut` makes it, for any sequence length; `reader` reads them; `shuffle` says how far they are mixed.
    """

    name: str
    config: SourceConfig
    shards: ShardSet
    members: Members
    cut: Callable[[int], SequenceIndex]
    index: SequenceIndex
    reader: Reader
    shuffle: Shuffle

    @property
    def manifest(self) -> Manifest:
        """What the set is made of."""
        return self.shards.manifest

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json that made its ids."""
        return self.shards.tokenizer


@dataclass(frozen=True)
class RawSamples:
    """Samples as they are stored; the fields are those of batch.Sequences, as numpy arrays."""

    ids: Int32
    document: Int32
    length: Int32
    source: Int32


def open_sources(config: DataConfig, sequence_length: int, split: str = TRAIN) -> list[Source]:
    """Opens the sets of a configuration, by name.

    Raises InputError, naming key or file, where one can't be had, holds no sample, or has another tokenizer than the
    rest; GaveUp if an index was altered. Makes what tables of a set are needed and not there.
    """
    if (config.path is None) == (not config.sources):
        raise InputError("data.path or data.sources.NAME.path: give one of them, a folder that `megatrain prep` wrote")
    wanted = config.named()
    sources = [_open_source(name, wanted[name], config, sequence_length, split) for name in sorted(wanted)]
    for source in sources:
        if source.manifest.tokenizer_sha256 != sources[0].manifest.tokenizer_sha256:
            raise bad_value(
                f"data.sources.{source.name}.path",
                source.config.path,
                f"its tokenizer is not that of {sources[0].name} ({sources[0].config.path}); all sources need one",
            )
    return sources


def _open_source(name: str, config: SourceConfig, data: DataConfig, sequence_length: int, split: str) -> Source:
    skip = data.bad_member is WhenBad.skip
    cache = Cache(data.cache) if URL.match(config.path) else None
    if cache is None:
        shards = open_set(config.path, split, skip)
    else:
        key = "data.path" if config.path == data.path else f"data.sources.{name}.path"
        shards = open_remote(config.path, split, key, data.remote, cache, skip)
    members = read_members(shards, data.index_path)
    open_index = open_best_fit if data.packing is Packing.best_fit else open_concat
    cut = partial(open_index, shards, members, index_path=data.index_path)
    index = cut(sequence_length)
    if index.samples == 0:
        raise InputError(f"{shards.tars or shards.folder}: holds no sample: it has {shards.manifest.tokens} tokens")
    payloads = None if cache is None else RemoteMembers(shards, members, cache)
    reader = Reader(shards, members, payloads, skip)
    shuffle = Shuffle(data.shuffle_block, data.shuffle_blocks) if data.shuffle_block else EVERYWHERE
    return Source(name, config, shards, members, cut, index, reader, shuffle)


def with_sequence_length(source: Source, sequence_length: int) -> Source:
    """The same source cut into other samples. Raises InputError where it then holds none."""
    index = source.cut(sequence_length)
    if index.samples == 0:
        raise InputError(f"{source.config.path}: holds no sample: it has {source.manifest.tokens} tokens")
    return replace(source, index=index)


def read_samples(sources: list[Source], source: Int32, sample: Int64) -> RawSamples:
    """Reads samples: number sample[i] of sources[source[i]], or an empty one where sample[i] is EMPTY (source 0).

    Padding is EOS. A sample that a skipped bad member has a part of is all padding.
    Raises GaveUp, naming shard and member, if one was altered.
    """
    width = sources[0].index.sequence_length + 1
    ids = np.full((len(sample), width), sources[0].manifest.eos_id, np.int32)
    length = np.zeros(len(sample), np.int32)
    begins: list[Int64] = []  # where documents begin, in all of `ids` as one row
    for number, each in enumerate(sources):
        rows = np.flatnonzero((source == number) & (sample != EMPTY))
        pieces = each.index.locate(sample[rows])
        size = pieces.stop - pieces.start
        before = np.cumsum(size) - size
        at = before - before[np.searchsorted(pieces.sample, pieces.sample)]
        stored = np.full((len(rows), width), each.manifest.eos_id, each.reader.id_dtype)
        to = pieces.sample * width + at
        usable, found = each.reader.read(pieces.start, pieces.stop, to, stored.ravel(), not each.index.whole_documents)
        bad = pieces.sample[~usable]
        stored[bad] = each.manifest.eos_id
        ids[rows] = stored
        length[rows[pieces.sample]] = at + size  # of several pieces the last one's stays
        length[rows[bad]] = 0
        shift = (rows - np.arange(len(rows))) * width  # from places in `stored` to places in `ids`
        begins += [place + shift[place // width] for place in (to, found)]
    padded = np.flatnonzero(length < width)
    begins.append(padded * width + length[padded])
    begin = np.concatenate(begins)
    kept = begin % width <= length[begin // width]  # unusable samples are all padding, from place 0 on
    return RawSamples(ids, spread(begin[kept], ids.shape), length, source)


def spread(begin: Int64, shape: tuple[int, ...]) -> Int32:
    """The place at which the document of each id begins: int32[B, S + 1], which is `shape`.

    begin: int64[any], where in all B * (S + 1) ids a document begins; each sample's first id needn't be named.
    """
    at = np.sort(np.concatenate([begin, np.arange(shape[0]) * shape[1]]))
    return np.repeat((at % shape[1]).astype(np.int32), np.diff(at, append=shape[0] * shape[1])).reshape(shape)


def take_bad_members(sources: list[Source]) -> list[str]:
    """The bad members that reading has skipped since the last call, a line each."""
    return [line for source in sources for line in source.reader.take_bad()]


def part_of(source: Source, weight: float) -> Part:
    """The source in the first segment that it is in."""
    return Part(
        weight=weight,
        max_epochs=source.config.max_epochs,
        manifest_sha256=source.manifest.sha256,
        samples=source.index.samples,
        shuffle_block=source.shuffle.block,
        shuffle_blocks=source.shuffle.blocks,
        permutation=0,
        first=0,
        epochs=0.0,
    )


class SampleOrder:
    """The endless shuffled row of samples that a run is trained on, in one segment.

    sources: from open_sources, cut as the segment says. segment: None: the first one, as the sources say.
    total_samples: where all sources have been seen max_epochs times; None: never.
    Raises InputError naming data.sources.NAME.weight or max_epochs.
    """

    def __init__(self, sources: list[Source], seed: int, segment: Segment | None = None) -> None:
        if segment is None:
            mixture = {source.name: part_of(source, source.config.weight) for source in sources}
            index = sources[0].index
            segment = first_segment(mixture, index.sequence_length, index.packing.value, global_batch_size=1)
        self.sources = sources
        self.seed = seed
        self._first = segment["mixture_from"]
        self._mixture = mixture_of(segment)
        length = self._mixture.total_samples
        self.total_samples = None if length is None else self._first + length
        parts = [segment["mixture"][source.name] for source in sources]
        self._keys = [
            source_key(seed, source.name, part["permutation"]) for source, part in zip(sources, parts, strict=True)
        ]
        self._begins = [part["first"] for part in parts]

    def locate(self, n: Int64) -> tuple[Int32, Int64]:
        """The source of samples n of the segment and the number in it: int32 and int64, of the shape of n (int64).

        EMPTY is number EMPTY of source 0.
        """
        real = n != EMPTY
        chosen, place = self._mixture.locate(n[real] - self._first)
        for number, (each, key, first) in enumerate(zip(self.sources, self._keys, self._begins, strict=True)):
            of = chosen == number
            place[of] = shuffled(place[of] + first, each.index.samples, key, each.shuffle)
        source, sample = np.zeros(n.shape, np.int32), np.full(n.shape, EMPTY, np.int64)
        source[real], sample[real] = chosen, place
        return source, sample

    def steps(self, first: int, size: int, places: Int64) -> Iterator[tuple[Int64, Int32, Int64]]:
        """For each of the steps whose first samples are first, first + size, ...: n, and what `locate` says of it.

        places: int64[B], which samples of a step are wanted, counted from its first. n: int64[B], EMPTY in place of
        samples of the next step, or past the end of the data. It goes on without end.
        """
        count = -(-LOCATED_AT_ONCE // len(places))
        while True:
            n = np.where(places < size, first + size * np.arange(count)[:, None] + places, EMPTY)
            if self.total_samples is not None:
                n[n >= self.total_samples] = EMPTY
            yield from zip(n, *self.locate(n), strict=True)
            first += count * size

    def read(self, n: Int64) -> RawSamples:
        """Samples n, int64[B]; EMPTY: an empty one. Raises GaveUp, naming shard and member, if one was altered."""
        return read_samples(self.sources, *self.locate(n))


def held_out_order(sources: list[Source], samples: int | None) -> tuple[Int32, Int64]:
    """The samples of an evaluation: int32[K] sources and int64[K] numbers in them, the first ones of each source.

    samples: K at most, in equal parts of the sources as far as they go; None: all.
    """
    parts = len(sources)
    wanted = [s.index.samples if samples is None else (samples + parts - 1 - i) // parts for i, s in enumerate(sources)]
    counts = [min(count, source.index.samples) for count, source in zip(wanted, sources, strict=True)]
    source = np.repeat(np.arange(parts, dtype=np.int32), counts)
    return source, np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
