"""The index of best-fit packing: which documents, or pieces of them, each sample of a set holds. No torch.

Design choices:
- Packing depends on the length of every document, so it is done once, shard by shard in several processes, and kept in
  a file beside the manifest (tables.py).
- A pack unit's samples are one block of numbers (packing.py), 8 bytes a piece and 4 a sample. Where the blocks are
  follows from two cumulative counts a unit. So sample n is found by one search, whatever the size of the set.
- A block is hashed when it is first touched, as members are: nothing that grows with the set is read at the start but
  32 bytes a unit.
- Lengths are taken from the tars without hashing the members, which would read every token. Their sum is checked here,
  and who reads a token hashes the member with its lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data.format import LENGTH_DTYPE, ShardSet
from megatrain.data.order import Int64
from megatrain.data.packing import WORD, Words, pack_unit
from megatrain.data.sequences import Members, Pieces, unit_starts
from megatrain.data.tables import Array, Column, by_processes, set_table
from megatrain.data_config import Packing
from megatrain.errors import GaveUp

DOCUMENTS_A_WORKER = 500_000
"""Fewer are packed in about the time in which a process starts."""


class BestFitIndex:
    """Samples that are whole documents as far as these fit. Made by open_best_fit.

    columns: first_sample, first_piece int64[units + 1]; begin int64[units], the token where a unit begins; digest
        uint64[units], the xxh3-64 of a unit's block; blocks uint32, of all units one after the other.
    """

    packing: ClassVar = Packing.best_fit
    whole_documents: ClassVar = True

    def __init__(self, shards: ShardSet, columns: dict[str, Array], sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._folder = shards.folder
        self._first_sample, self._first_piece = columns["first_sample"], columns["first_piece"]
        self._begin, self._digest, self._blocks = columns["begin"], columns["digest"], columns["blocks"]
        self._verified = np.zeros(len(self._begin), np.bool_)
        self.samples = int(self._first_sample[-1])
        # A document of one id is left out; any other has an id more than it is long for each piece after its first.
        self._ids = shards.manifest.tokens + int(self._first_piece[-1]) - shards.manifest.documents

    def locate(self, sample: Int64) -> Pieces:
        """Raises GaveUp if a block was altered."""
        unit = np.searchsorted(self._first_sample, sample, side="right") - 1
        for number in np.unique(unit[~self._verified[unit]]).tolist():
            self._verify(number)
        first = self._first_sample[unit]
        samples, pieces = self._first_sample[unit + 1] - first, self._first_piece[unit + 1] - self._first_piece[unit]
        ends = first + 2 * self._first_piece[unit]  # the words before a unit's block
        starts, place = ends + samples, sample - first
        stop = self._blocks[ends + place].astype(np.int64)
        start = np.where(place > 0, self._blocks[ends + np.maximum(place, 1) - 1], 0)
        counts = stop - start
        of = np.repeat(np.arange(len(sample)), counts)
        word = np.arange(len(of)) + (starts + start - (np.cumsum(counts) - counts))[of]
        begin = self._begin[unit[of]] + self._blocks[word]
        return Pieces(of, begin, begin + self._blocks[word + pieces[of]])

    @property
    def padding_share(self) -> float:
        return 1 - (self._ids - self.samples) / (self.samples * self.sequence_length)

    def _verify(self, unit: int) -> None:
        first, last = (self._first_sample[unit : unit + 2] + 2 * self._first_piece[unit : unit + 2]).tolist()
        if xxhash.xxh3_64_intdigest(self._blocks[first:last].data) != self._digest[unit]:
            name = f"best_fit-{self.sequence_length}"
            raise GaveUp(f"{self._folder}: its {name} index was altered; delete it, and the next start makes it anew")
        self._verified[unit] = True


def open_best_fit(
    shards: ShardSet, members: Members, sequence_length: int, index_path: str | None = None
) -> BestFitIndex:
    """The index of a set, which is made first if it isn't there: in seconds for a billion tokens.

    members: read_members(shards). index_path: data.index_path.
    Raises InputError if the file can't be written, GaveUp if the set was altered.
    """
    name = f"{Packing.best_fit.value}-{sequence_length}"
    columns = set_table(shards, index_path, name, lambda: _columns(shards, members, sequence_length), {"blocks"})
    return BestFitIndex(shards, columns, sequence_length)


@dataclass(frozen=True)
class _Shard:
    """What one process packs. units: int64, the member that each unit begins with, and the end."""

    path: Path
    sequence_length: int
    tokens: Int64
    documents: Int64
    lengths_offset: Int64
    units: npt.NDArray[np.intp]


@dataclass(frozen=True)
class _Packed:
    """What became of it: the blocks of its units, and of each unit its samples, pieces and digest."""

    blocks: Words
    samples: list[int]
    pieces: list[int]
    digests: list[int]


def _columns(shards: ShardSet, members: Members, sequence_length: int) -> Iterator[Column]:
    """The columns of the index. Blocks come first: they are written as they are made."""
    units = unit_starts(members, sequence_length)
    tasks = [
        _Shard(
            path=shards.path(int(members.shard[first])),
            sequence_length=sequence_length,
            tokens=np.diff(members.first_token[first : last + 1]),
            documents=members.documents[first:last],
            lengths_offset=members.lengths_offset[first:last],
            units=np.append(units[(units >= first) & (units < last)], last) - first,
        )
        for first, last in _shard_bounds(members)
    ]
    worth = 1 + shards.manifest.documents // DOCUMENTS_A_WORKER
    samples, pieces, digests = [0], [0], list[int]()

    def blocks() -> Iterator[Words]:
        for packed in by_processes(_pack_shard, tasks, worth):
            samples.extend(packed.samples)
            pieces.extend(packed.pieces)
            digests.extend(packed.digests)
            yield packed.blocks

    yield "blocks", WORD, blocks()
    yield "first_sample", "<i8", [np.cumsum(samples)]
    yield "first_piece", "<i8", [np.cumsum(pieces)]
    yield "begin", "<i8", [members.first_token[units]]
    yield "digest", "<u8", [np.array(digests, np.uint64)]


def _shard_bounds(members: Members) -> list[tuple[int, int]]:
    """The first member of each shard that has any, and one past its last."""
    first = np.flatnonzero(np.diff(members.shard, prepend=-1))
    return list(zip(first.tolist(), [*first[1:].tolist(), len(members)], strict=True))


def _pack_shard(shard: _Shard) -> _Packed:
    lengths = _read_lengths(shard)
    packed = []
    for first, last in zip(shard.units[:-1], shard.units[1:], strict=True):
        unit = np.concatenate(lengths[first:last])
        if unit.sum() > np.iinfo(WORD).max:
            raise GaveUp(
                f"{shard.path}: {unit.sum()} tokens in one pack unit; data.packing=best_fit takes 2^32 at most"
            )
        packed.append(pack_unit(unit, shard.sequence_length))
    blocks = [block for block, _, _ in packed]
    return _Packed(
        blocks=np.concatenate(blocks),
        samples=[samples for _, samples, _ in packed],
        pieces=[pieces for _, _, pieces in packed],
        digests=[xxhash.xxh3_64_intdigest(block.data) for block in blocks],
    )


def _read_lengths(shard: _Shard) -> list[Int64]:
    """The lengths of the documents of each member."""
    found = []
    try:
        with shard.path.open("rb") as file:
            for tokens, documents, offset in zip(shard.tokens, shard.documents, shard.lengths_offset, strict=True):
                file.seek(int(offset))
                data = file.read(int(documents) * LENGTH_DTYPE.itemsize)
                whole = len(data) == documents * LENGTH_DTYPE.itemsize
                lengths = np.frombuffer(data if whole else b"", LENGTH_DTYPE).astype(np.int64)
                if lengths.sum() != tokens or not lengths.all():
                    raise GaveUp(f"{shard.path}: the documents' lengths at byte {offset} aren't those of its index")
                found.append(lengths)
    except OSError as error:
        raise GaveUp(f"{shard.path}: can't be read: {error.strerror}") from None
    return found
