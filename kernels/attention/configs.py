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
    ("sm_80", 32): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), tma=False),
    ("sm_80", 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 4, 3), tma=False),
    ("sm_80", 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), tma=False),
    ("sm_80", 256): Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), tma=False),
    ("sm_90", 32): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), tma=True),
    ("sm_90", 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), tma=True),
    ("sm_90", 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), tma=True),
    ("sm_90", 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 8, 2), tma=True),
    ("sm_100", 32): Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), tma=True),
    ("sm_100", 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), tma=True),
    ("sm_100", 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), tma=True),
    ("sm_100", 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1), tma=True),
    ("gfx942", 32): Tiles(Tile(128, 64, 4, 2), Tile(128, 64, 4, 2), Tile(32, 128, 4, 1), tma=False),
    ("gfx942", 64): Tiles(Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(32, 128, 4, 1), tma=False),
    ("gfx942", 128): Tiles(Tile(128, 32, 4, 2), Tile(128, 16, 4, 2), Tile(16, 64, 4, 2), tma=False),
    ("gfx942", 256): Tiles(Tile(128, 32, 8, 1), Tile(64, 16, 4, 2), Tile(16, 32, 4, 1), tma=False),
}
"""bf16, by (architecture, padded head dimension).

A warp of gfx942 is a wave of 64 threads. Its tiles leave a thread at most 256 registers, so that two waves share a
SIMD, and give each wave 32 rows where that is possible: with 16, what a wave reads of shared memory takes as long as
its products.
"""

FP32_WITHOUT_MATRIX_UNITS = {
    32: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), tma=False),
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), tma=False),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), tma=False),
    256: Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1), tma=False),
}
"""By padded head dimension. NVIDIA's architectures don't differ in full precision; TMA's layout spills."""

FP32 = {
    **{(f"sm_{n}", head_dim): tiles for n in (80, 90, 100) for head_dim, tiles in FP32_WITHOUT_MATRIX_UNITS.items()},
    ("gfx942", 32): Tiles(Tile(128, 32, 4, 2), Tile(128, 16, 4, 2), Tile(16, 128, 4, 1), tma=False),
    ("gfx942", 64): Tiles(Tile(128, 32, 4, 2), Tile(128, 16, 4, 1), Tile(16, 128, 4, 1), tma=False),
    ("gfx942", 128): Tiles(Tile(64, 16, 4, 1), Tile(64, 16, 4, 1), Tile(16, 32, 4, 1), tma=False),
    ("gfx942", 256): Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), tma=False),
}
"""fp32, by (architecture, padded head dimension)."""

ARCHITECTURES = tuple(dict.fromkeys(architecture for architecture, _ in BF16))


def tiles(architecture: str, head_dim: int, itemsize: int) -> Tiles:
    """For an architecture ("sm_90"), a head dimension up to 256 and elements of 2 or 4 bytes.

    Raises ValueError for an architecture that isn't here.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"attention: no Triton kernel for {architecture}; legal: {', '.join(ARCHITECTURES)}")
    padded = max(32, 1 << (head_dim - 1).bit_length())
    return (FP32 if itemsize == 4 else BF16)[architecture, padded]
