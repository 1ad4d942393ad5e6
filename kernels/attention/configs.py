"""Tiles of the attention kernels, by architecture, head dimension (padded to a power of two) and element size.

What is here was compiled by the triton of TRITON without spilling; budgets.json has the resources of each, and none was
timed on a GPU yet. Another triton may need others, so it is refused rather than guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass

TRITON = "3.7.1"


@dataclass(frozen=True)
class Tile:
    """`queries` x `keys` scores at a time, by `warps` warps, with `stages` tiles of loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of each kernel. tma: tensors come as TMA descriptors, else as pointers."""

    forward: Tile
    backward_queries: Tile
    backward_keys: Tile
    tma: bool


INTERPRETER = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), tma=True)
"""Small, so that short sequences have many: each of them is a program in numpy."""


def tiles(arch: int, head_dim: int, itemsize: int) -> Tiles:
    """For `arch` (90: sm_90), a head dimension and elements of `itemsize` bytes. Raises ValueError where there are none."""
    padded = 1 << (head_dim - 1).bit_length()
    found = TILES.get((arch, max(padded, 32), itemsize))
    if found is None:
        known = sorted({a for a, _, _ in TILES})
        raise ValueError(
            f"no attention kernel for sm_{arch}, head dimension {head_dim}, {itemsize}-byte elements: "
            f"there are kernels for sm_{', sm_'.join(map(str, known))} and head dimensions up to 256"
        )
    return found


TILES = {
    (80, 128, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), tma=False),
    (90, 128, 2): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), tma=True),
}
