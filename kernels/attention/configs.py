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

BF16 = {
    (80, 32): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), tma=False),
    (80, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 4, 3), tma=False),
    (80, 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), tma=False),
    (80, 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), tma=False),
    (90, 32): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), tma=True),
    (90, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), tma=True),
    (90, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), tma=True),
    (90, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 8, 2), tma=True),
    (100, 32): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), tma=True),
    (100, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), tma=True),
    (100, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), tma=True),
    (100, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), tma=True),
}
"""bf16, by (architecture, padded head dimension)."""

FP32 = {
    32: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), tma=False),
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), tma=False),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), tma=False),
    256: Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), tma=False),
}
"""By padded head dimension. Full precision has no matrix units, so architectures don't differ; TMA's layout spills."""

ARCHITECTURES = tuple(sorted({arch for arch, _ in BF16}))


def tiles(arch: int, head_dim: int, itemsize: int) -> Tiles:
    """For an architecture (90: sm_90), a head dimension up to 256 and elements of 2 or 4 bytes.

    Raises ValueError for an architecture that isn't here.
    """
    if arch not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise ValueError(f"attention: no Triton kernel for sm_{arch}; legal: {known}")
    padded = max(32, 1 << (head_dim - 1).bit_length())
    return FP32[padded] if itemsize == 4 else BF16[arch, padded]
