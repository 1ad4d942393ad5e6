"""Tiles of the norm kernels, by width. The same for every architecture, for all wait for memory alone.

A thread has 16 elements of a tile: enough 128-bit loads in flight, and few enough that the backward pass keeps five
such arrays without spilling. (triton 3.7.1; the resources of each are in budgets.json.)
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_WIDTH = 16384
"""The widest row that the forward pass holds whole; beyond, it goes over tiles of so many columns."""

BACKWARD_WIDTH = 8192
"""The same of the backward pass, which holds the weight and its gradient besides."""

TILE = 4096
"""Elements of a tile where rows are short."""

PER_THREAD = 16


@dataclass(frozen=True)
class Tile:
    """rows x block elements a program, by `warps` warps."""

    rows: int
    block: int
    warps: int


def tile(width: int, widest: int) -> Tile:
    """The tile for rows of `width` elements where a program may hold `widest`: whole rows if it can."""
    block = min(1 << max(width - 1, 15).bit_length(), widest)
    rows = max(1, TILE // block)
    return Tile(rows, block, rows * block // (32 * PER_THREAD))
