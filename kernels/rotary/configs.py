"""Tiles of the rotary kernel, by head dimension. The same for every architecture, for it waits for memory alone.

16 elements a thread, in pairs of 128-bit loads of bf16. (triton 3.7.1; budgets.json has what that takes.)
"""

from __future__ import annotations

TILE = 2048
"""Elements of a program."""

THREADS = 128


def tile(half: int) -> tuple[int, int]:
    """Heads a program, and the block that holds half a head."""
    block = 1 << max(half - 1, 0).bit_length()
    return max(1, TILE // (2 * block)), block
