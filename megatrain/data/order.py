"""A shuffle that is a function: where the i-th place of a keyed permutation of [0, size) leads. No torch.

Design choices:
- A Feistel network whose halves are a row and a column of a grid just large enough (Black and Rogaway 2002, "Ciphers
  with arbitrary finite domains", generalised Feistel). The grid has fewer than sqrt(size) cells too many, so walking
  on from a cell outside of [0, size) is rare; any size is a true permutation, and nothing is kept in memory.
- Everything is vectorised over places, and so are keys: one call crosses as many epochs as it likes.
- Sixteen rounds: with twelve, sets of five samples are measurably not uniform. It is statistics, not secrecy.
- Where large sequential reads matter more than the last bit of mixing, blocks of consecutive samples are permuted, and
  samples within windows of so many permuted blocks. Both by the same network, so nothing is kept here either. The set
  is a ring that each epoch cuts into blocks from another sample on: the rest that fills no block, at the end of each
  epoch, is of other samples each time, and so are neighbours.
- uint64 arithmetic wraps; arrays do so silently, which is why scalars are made arrays first.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

ROUNDS = 16
MAX_SIZE = 1 << 62
# Constants are arrays without dimensions: numpy takes a third of the time that it takes with scalars.
_SHIFT_27, _SHIFT_30, _SHIFT_31, _SHIFT_32 = (np.array(bits, np.uint64) for bits in (27, 30, 31, 32))
_FIRST, _SECOND = (np.array(factor, np.uint64) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ROUND_KEYS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Shuffle:
    """How far samples are mixed.

    block: consecutive samples that stay near each other; None: samples go anywhere. blocks: how many blocks, from all
    over the set, make a window whose samples are mixed with each other. Both at least 1.
    """

    block: int | None = None
    blocks: int = 1


EVERYWHERE = Shuffle()


def source_key(seed: int, source: str, permutation: int) -> int:
    """The 64-bit key of all epochs of `source` under its permutation number `permutation`."""
    text = json.dumps([seed, source, permutation]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def shuffled(position: Int64, size: int, key: int, shuffle: Shuffle = EVERYWHERE) -> Int64:
    """The sample at each place of an endless stream that runs through all of [0, size) once an epoch.

    position: int64[any], counts on over epochs: epoch position // size, place position % size, each epoch its own
        permutation. Returns int64[any] in [0, size).
    """
    position = np.asarray(position)
    place = position % size
    # Mixed twice, so that epoch e under one key is no epoch under another by mere addition.
    epoch_key = _mix(_mix((position // size).view(np.uint64)) ^ np.uint64(key))
    if shuffle.block is None:
        return permute(place, size, epoch_key)
    place = _mix_windows(place, size, epoch_key, shuffle.block * shuffle.blocks)
    return _permute_blocks(place, size, epoch_key, shuffle.block)


def _mix_windows(place: Int64, size: int, epoch_key: UInt64, window: int) -> Int64:
    """Permutes the places of each window: [0, window), [window, 2 window), ..., of which the last may be short."""
    number = place // window
    key = _mix(epoch_key ^ _mix(number.view(np.uint64) + np.uint64(1)))
    whole = size // window
    mixed = number * window
    for chosen, length in ((number < whole, window), (number == whole, size - whole * window)):
        if length:
            mixed[chosen] += permute(place[chosen] % window, length, key[chosen])
    return mixed


def _permute_blocks(place: Int64, size: int, epoch_key: UInt64, block: int) -> Int64:
    """The sample at each place of the ring whose blocks stand permuted; what fills no block stays at the end."""
    whole = size // block
    ring = place.copy()
    chosen = place < whole * block
    if whole:
        ring[chosen] %= block
        ring[chosen] += block * permute(place[chosen] // block, whole, epoch_key[chosen])
    return (ring + (_mix(epoch_key) % np.uint64(size)).view(np.int64)) % size


def permute(index: Int64, size: int, key: UInt64) -> Int64:
    """Where the permutation of [0, size) with each element's key sends `index` (int64[n], key uint64[n])."""
    if not 0 < size <= MAX_SIZE:
        raise ValueError(f"a permutation of {size} elements: the size must be in 1..2^62")
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    image = np.array(index, dtype=np.uint64)
    outside = np.arange(image.size)
    while outside.size:
        image[outside] = _encrypt(image[outside], key[outside], np.array(rows, np.uint64), np.array(columns, np.uint64))
        outside = outside[image[outside] >= size]
    return image.view(np.int64)


def _encrypt(cell: UInt64, key: UInt64, rows: UInt64, columns: UInt64) -> UInt64:
    """One pass of the network over the cells of a grid: row and column are shifted by hashes of each other."""
    row, column = np.divmod(cell, columns)
    for number in range(len(_ROUND_KEYS)):
        hashed = key + _ROUND_KEYS[number, ...]
        if number % 2 == 0:
            hashed ^= column
            row += _below(rows, hashed)
            row %= rows
        else:
            hashed ^= row
            column += _below(columns, hashed)
            column %= columns
    return row * columns + column


def _below(limit: UInt64, x: UInt64) -> UInt64:
    """A hash of `x` in [0, limit), limit <= 2^32: its upper half as a fraction."""
    hashed = _mix(x)
    hashed >>= _SHIFT_32
    hashed *= limit
    hashed >>= _SHIFT_32
    return hashed


def _mix(x: UInt64) -> UInt64:
    """A bijection of 64 bits in which every bit depends on every other: the finaliser of SplitMix64 (Steele, Lea and
    Flood 2014, "Fast splittable pseudorandom number generators").
    """
    mixed = x ^ (x >> _SHIFT_30)
    mixed *= _FIRST
    mixed ^= mixed >> _SHIFT_27
    mixed *= _SECOND
    mixed ^= mixed >> _SHIFT_31
    return mixed
