"""Which rank's file holds which elements: index.json, and the ranks' own indexes that it is merged from.

Design choices:
- Columns of numbers, no object for each range: 512 ranks with 300 parameters in 3 states have 460,800 ranges. Every
  reader needs all of them, and has them in 11 MB.
- In index.json a range begins where the one before it ends: a gap or an overlap can't be written down in it.
- A reader checks what it parses, though its hash was right: no number in it may lead outside the files.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatrain.checkpoint.format import DTYPES, INDEX, VERSION, BrokenCheckpoint, encode

Numbers: TypeAlias = NDArray[np.int64]
COLUMNS = ("rank", "stop", "offset")


class Row(NamedTuple):
    """A range of one state of one parameter, as a data file holds it.

    rank: whose data file. shape: of the whole parameter. start, stop: elements of the flattened parameter.
    offset: bytes into the data file.
    """

    rank: int
    state: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, eq=False)
class Ranges:
    """The ranges of one state of one parameter, ascending; they are exactly the whole of it.

    shape: of the parameter. dtype: of its elements, as torch names it.
    rank, stop, offset: int64 [ranges], as in Row. Each range begins where the one before it ends, the first at 0.
    """

    shape: tuple[int, ...]
    dtype: str
    rank: Numbers
    stop: Numbers
    offset: Numbers

    @property
    def size(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def start(self) -> Numbers:
        """int64 [ranges]: the first element of each."""
        return np.concatenate([np.zeros(1, np.int64), self.stop[:-1]])

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(rank, start, stop, offset) of each range that has elements of [start, stop)."""
        if start == stop:
            return
        first, last = np.searchsorted(self.stop, start, side="right"), np.searchsorted(self.stop, stop)
        columns = (self.rank, self.start, self.stop, self.offset)
        yield from zip(*(column[first : last + 1].tolist() for column in columns), strict=True)


Index: TypeAlias = dict[tuple[str, str], Ranges]
"""By (state, name of the parameter)."""


def encode_rows(rows: Iterable[Row], hashes: str) -> bytes:
    """A rank's own index. hashes: xxh3-128 of its file of chunk hashes."""
    return encode({"version": VERSION, "hashes": hashes, "rows": [row[1:] for row in rows]})


def parse_rows(raw: bytes, rank: int) -> tuple[list[Row], str]:
    """What encode_rows() was given on `rank`."""
    value = json.loads(raw)
    rows = [Row(rank, state, name, tuple(shape), *rest) for state, name, shape, *rest in value["rows"]]
    return rows, value["hashes"]


def merge(rows: Iterable[Row]) -> Index:
    """The index of all ranks' rows.

    Raises BrokenCheckpoint: a gap, an overlap, or rows that disagree about a shape or dtype.
    """
    numbers: dict[tuple[str, str], array[int]] = {}
    kinds: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for row in rows:
        key, kind = (row.state, row.name), (row.shape, row.dtype)
        if kinds.setdefault(key, kind) != kind:
            raise BrokenCheckpoint(f"{row.state} of {row.name}: ranks disagree about its shape or dtype")
        numbers.setdefault(key, array("q")).extend((row.start, row.rank, row.stop, row.offset))
    index = {}
    for key, (shape, dtype) in kinds.items():
        table = np.frombuffer(numbers[key], np.int64).reshape(-1, 4)
        start, rank, stop, offset = table[np.argsort(table[:, 0], kind="stable")].T
        _check_coverage(" of ".join(key), math.prod(shape), start, stop)
        index[key] = Ranges(shape, dtype, rank, stop, offset)
    return index


def _check_coverage(what: str, size: int, starts: Numbers, stops: Numbers) -> None:
    """Raises BrokenCheckpoint unless ranges in ascending order are exactly 0 to `size`."""
    end = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if not 0 <= start < stop <= size:
            raise BrokenCheckpoint(f"{what}: {start} to {stop} of {size} is no range")
        if start < end:
            raise BrokenCheckpoint(f"{what}: {start} to {stop} of {size} is held twice")
        if start > end:
            raise BrokenCheckpoint(f"{what}: no rank holds {end} to {start} of {size}")
        end = stop
    if end < size:
        raise BrokenCheckpoint(f"{what}: no rank holds {end} to {size} of {size}")


def encode_index(index: Index, hashes: Sequence[str]) -> bytes:
    """index.json. hashes: of each rank, the xxh3-128 of its file of chunk hashes.

    Raises BrokenCheckpoint where the states of a parameter disagree about its shape.
    """
    parameters = []
    by_name = sorted(index, key=lambda key: key[1])
    for name, keys in groupby(by_name, key=lambda key: key[1]):
        states = {state: index[state, name] for state, _ in keys}
        shapes = {ranges.shape for ranges in states.values()}
        if len(shapes) > 1:
            raise BrokenCheckpoint(f"{name}: its states disagree about its shape")
        columns = {
            state: {"dtype": ranges.dtype, **{column: getattr(ranges, column).tolist() for column in COLUMNS}}
            for state, ranges in states.items()
        }
        parameters.append({"name": name, "shape": shapes.pop(), "states": columns})
    return encode({"version": VERSION, "hashes": hashes, "parameters": parameters})


def parse_index(raw: bytes, world_size: int) -> tuple[Index, list[str]]:
    """What encode_index() was given. Raises BrokenCheckpoint where what it says can't be."""
    try:
        value = json.loads(raw, object_hook=_columns_to_arrays)
        hashes: list[str] = value["hashes"]
        index = {
            (state, parameter["name"]): Ranges(tuple(parameter["shape"]), **columns)
            for parameter in value["parameters"]
            for state, columns in parameter["states"].items()
        }
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise BrokenCheckpoint(f"{INDEX}: not of this format ({error})") from error
    for key, ranges in index.items():
        if not _possible(ranges, world_size):
            raise BrokenCheckpoint(f"{INDEX}: what it says of {' of '.join(key)} can't be")
    return index, hashes


def _columns_to_arrays(value: dict[str, Any]) -> dict[str, Any]:
    """Applied to each object as it is parsed, so that numbers of one state at a time are Python's."""
    return {key: np.array(item, np.int64) if key in COLUMNS else item for key, item in value.items()}


def _possible(ranges: Ranges, world_size: int) -> bool:
    return (
        ranges.dtype in DTYPES
        and len(ranges.rank) == len(ranges.stop) == len(ranges.offset) > 0
        and bool(np.all((ranges.rank >= 0) & (ranges.rank < world_size)))
        and bool(np.all(ranges.offset >= 0))
        and bool(np.all(np.diff(ranges.stop, prepend=0) > 0))
        and int(ranges.stop[-1]) == ranges.size
    )
