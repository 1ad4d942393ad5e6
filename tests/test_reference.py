"""The reference loop itself: it learns, and cutting a batch into micro-batches changes nothing but rounding."""

from __future__ import annotations

import functools

import pytest
import torch

from megatrain.config import OptimConfig, Precision
from tests import reference, samples

STEPS = 20


@functools.cache
def run(micro_batch_size: int, precision: Precision = Precision.fp32, seed: int = 0) -> reference.Result:
    torch.set_num_threads(1)
    batches = [samples.batch(samples=8, sequence_length=16, seed=step) for step in range(STEPS)]
    rates = [samples.OPTIM.learning_rate] * STEPS
    return reference.train(samples.MODEL, samples.OPTIM, batches, rates, micro_batch_size, precision, seed)


def test_it_learns() -> None:
    result = run(8)
    assert sum(result.losses[-5:]) / 5 < 0.8 * result.losses[0]
    assert min(result.gradient_norms) > samples.OPTIM.gradient_clip


def test_micro_batches_change_nothing_in_fp64() -> None:
    assert reference.distance(run(1, Precision.fp64), run(8, Precision.fp64)) <= 1e-12


def test_the_floor_of_fp32() -> None:
    assert 2.5e-7 <= reference.floor(run) < 1e-3


def test_bf16_stays_near_fp32() -> None:
    # At this learning rate the loss falls by 1 in these steps.
    assert 1e-4 < reference.difference(run(8, Precision.bf16).losses, run(8).losses) < 0.1


def test_groups_take_the_decay_they_should() -> None:
    optim = OptimConfig(weight_decay=0.1, decay_embeddings=True)
    masters = {name: torch.zeros(1) for name in run(8).parameters}
    decayed, plain = reference.adamw(samples.MODEL, optim, masters).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    # Embedding, head and four matrices a layer; the last norm and four a layer (two of them of queries and keys).
    assert (len(decayed["params"]), len(plain["params"])) == (2 + 4 * 3, 1 + 4 * 3)


def test_difference_is_relative_above_one() -> None:
    assert reference.difference([1.0, 12.0], [1.5, 10.0]) == pytest.approx(1 / 3)
