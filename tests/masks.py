"""Random legal masks for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def masks(draw: st.DrawFn, max_batch: int = 2, max_length: int = 12) -> tuple[Tensor, Tensor]:
    """start and end, int32[B, S]: never decreasing, start[m] <= m < end[m] <= S."""
    batch, length = draw(st.integers(1, max_batch)), draw(st.integers(1, max_length))
    row = st.lists(st.integers(0, length), min_size=length, max_size=length)
    rows = st.lists(row, min_size=batch, max_size=batch)
    query = torch.arange(length, dtype=torch.int32)
    start = torch.minimum(torch.tensor(draw(rows), dtype=torch.int32), query).cummax(dim=1).values
    end = torch.maximum(torch.tensor(draw(rows), dtype=torch.int32), query + 1).cummax(dim=1).values
    return start, end


def brute_force(start: Tensor, end: Tensor) -> Tensor:
    """bool[B, S, S]: whether query m sees key n, one by one."""
    batch, length = start.shape
    seen = [
        [[int(start[b, m]) <= n < int(end[b, m]) for n in range(length)] for m in range(length)] for b in range(batch)
    ]
    return torch.tensor(seen)
