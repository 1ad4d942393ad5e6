"""Tiles of the norm kernels, by width. The same for every architecture, for all wait for memory alone.

Design choices:
- The forward pass has 8 elements of a tile a thread: one 128-bit load of each bf16 tensor, and so few registers that a
  multiprocessor runs as many threads as it can.
- The backward pass has 16, for what it shares between rows (the weight and its gradient) weighs less then.
- Chosen with triton 3.7.1; what each takes is in budgets.json.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 4096
"""Elements of a tile where rows are short."""


@dataclass(frozen=True)
class Tile:
    """rows x block elements a program, by `threads` threads."""

    rows: int
    block: int
    threads: int


def forward(width: int) -> Tile:
    """Whole rows up to 16384 elements; beyond, tiles of so many columns."""
    return _tile(width, 16384, per_thread=8)


def backward(width: int) -> Tile:
    """Whole rows up to 8192 elements; beyond, tiles of so many columns."""
    return _tile(width, 8192, per_thread=16)


def _tile(width: int, widest: int, per_thread: int) -> Tile:
    block = min(1 << max(width - 1, 15).bit_length(), widest)
    rows = max(1, TILE // block)
    return Tile(rows, block, min(rows * block // per_thread, 1024))
