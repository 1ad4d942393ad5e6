"""What all engines share."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatrain.engines import common
from megatrain.engines.common import Sums, differing_weights
from tests import samples


def test_a_loss_that_is_not_finite_stays_with_its_source() -> None:
    batch = samples.batch(samples=4, sequence_length=8, seed=0)
    losses = torch.ones(4, 8)
    losses[batch.source == 1] = math.nan
    sums = Sums(2, torch.device("cpu"))
    sums.add(batch, losses)
    assert sums.loss[0] == 16
    assert sums.loss[1].isnan()
    assert sums.targets.tolist() == [int((batch.targets[batch.source == i] >= 0).sum()) for i in range(2)]


def held(weights: Tensor, masters: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Between two that are as they should be."""
    right = torch.tensor([1.0, -2.5])
    return [("before", right.bfloat16(), right), ("this", weights, masters), ("after", right, right.clone())]


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    size=st.integers(1, 40),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_any_bit_of_a_weight_shows(dtype: torch.dtype, size: int, seed: int, data: st.DataObject) -> None:
    masters = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    weights = masters.to(dtype, copy=True)
    with mock.patch.object(common, "COMPARED_ELEMENTS", 7):
        assert differing_weights(held(weights, masters)) is None
        byte = data.draw(st.integers(0, size * dtype.itemsize - 1))
        weights.view(torch.uint8)[byte] ^= 1 << data.draw(st.integers(0, 7))
        assert differing_weights(held(weights, masters)) == "this"


@pytest.mark.parametrize(
    ("weight", "master", "differs"),
    [
        (0.0, -0.0, True),
        (math.nan, math.nan, False),
        (-math.nan, math.nan, False),
        (math.nan, math.inf, True),
        (math.inf, math.inf, False),
        (1.0, 1.0 + 2.0**-9, False),  # Half of bf16's last digit: rounded to even, down here and up below.
        (1.0, 1.0 + 3 * 2.0**-9, True),
        (1.0 + 2.0**-6, 1.0 + 3 * 2.0**-8, False),
    ],
)
def test_what_a_master_rounds_to(weight: float, master: float, differs: bool) -> None:
    weights, masters = torch.tensor([1.0, weight]).bfloat16(), torch.tensor([1.0, master])
    assert differing_weights(held(weights, masters)) == ("this" if differs else None)


def test_without_weights_none_differs() -> None:
    assert differing_weights([]) is None
    assert differing_weights(held(torch.empty(0), torch.empty(0))) is None
