from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.engines.ranges import MASTER, Shard, load
from tests.engines.states import WholeState


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=8, unique=True).map(sorted),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_load_fills_the_views_with_their_ranges(cuts: list[int], dtype: str) -> None:
    values = torch.arange(60.0)
    ranges = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    size = sum(stop - start for start, stop in ranges)
    flat = torch.full((size + 2,), -1.0, dtype=getattr(torch, dtype))
    shard = Shard("w", (6, 10), ranges, {MASTER: flat[1:-1]})
    load(shard, WholeState(0, {(MASTER, "w"): values}))
    expected = [value for start, stop in ranges for value in range(start, stop)]
    assert flat.tolist() == [-1.0, *expected, -1.0]
