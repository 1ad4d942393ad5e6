from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data.slots import idle_share, micro_batches, slots


@given(size=st.integers(1, 200), micro=st.integers(1, 20), ranks=st.integers(1, 20))
def test_ranks_hold_every_place_once(size: int, micro: int, ranks: int) -> None:
    places = np.stack([slots(size, micro, ranks, rank) for rank in range(ranks)])
    assert places.shape == (ranks, micro_batches(size, micro, ranks), micro)
    flat = np.sort(places.ravel())
    assert np.array_equal(flat, np.arange(len(flat)))
    assert len(flat) >= size
    assert idle_share(size, micro, ranks) == pytest.approx((len(flat) - size) / len(flat))
    # No round of micro-batches is idle on all ranks.
    assert (places[:, -1] < size).any()


def test_an_uneven_batch() -> None:
    assert micro_batches(10, 2, 4) == 2
    assert slots(10, 2, 4, 0).tolist() == [[0, 1], [8, 9]]
    assert slots(10, 2, 4, 3).tolist() == [[6, 7], [14, 15]]
    assert idle_share(10, 2, 4) == pytest.approx(6 / 16)
    assert idle_share(16, 2, 4) == 0
