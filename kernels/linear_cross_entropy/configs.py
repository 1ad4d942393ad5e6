"""Tiles and chunks of the linear cross-entropy: the same for every architecture, for the kernels wait for memory alone.

(triton 3.7.1; budgets.json has what the tiles take.)
"""

from __future__ import annotations

FORWARD_BLOCK = 8192
BACKWARD_BLOCK = 4096
THREADS = 512
"""A thread has 16 elements of a row, so two 128-bit loads, and half as many in the backward pass, which has no loop."""

CHUNK = 2**26
"""Logits at a time: 128 MiB in bf16, and 512 rows of a vocabulary of 128k, enough to fill a matrix product."""


def rows(vocabulary: int) -> int:
    """Rows a chunk."""
    return max(1, CHUNK // vocabulary)
