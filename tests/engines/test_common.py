"""What all engines share."""

from __future__ import annotations

import math

import torch

from megatrain.engines.common import Sums
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
