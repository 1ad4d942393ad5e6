"""Law 4: every ZeRO stage on two processes trains the numbers of one process.

Target counts are unequal among ranks and micro-batches, the ranks don't divide the global batch, and clipping is active
at every step. The learning rate is one at which rounding isn't amplified: the reference's own floor stays at its least.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean

import pytest

from megatrain.batch import Batch
from megatrain.config import EngineConfig, Precision
from tests import reference, samples
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, Curve, train_from_start

pytestmark = pytest.mark.distributed

STEPS = 20
RANKS = 2
LAYOUTS = [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


def global_batches(seed: int = 0) -> list[Batch]:
    return [samples.batch(samples=7, sequence_length=32, seed=1000 * seed + step) for step in range(STEPS)]


@cache
def one_process(precision: Precision, seed: int = 0, micro_batch_size: int = 7) -> reference.Result:
    rates = [LEARNING_RATE] * STEPS
    batches = global_batches(seed)
    return reference.train(samples.MODEL, samples.OPTIM, batches, rates, micro_batch_size, precision, seed)


@cache
def fp32_floor() -> float:
    return reference.floor(lambda size: one_process(Precision.fp32, micro_batch_size=size))


def two_processes(pool: Pool, stage: int, offload: bool, precision: Precision, seed: int = 0) -> Curve:
    engine = EngineConfig(zero_stage=stage, offload_optimizer=offload, persistence_elements=100)
    curves = pool.run(
        train_from_start,
        ranks=RANKS,
        engine=engine,
        precision=precision,
        batches=global_batches(seed),
        micro_batch_size=2,
        seed=seed,
    )
    assert curves[0] == curves[1], "Stats have to be equal on every rank"
    curve: Curve = curves[0]
    return curve


def distance(curve: Curve, result: reference.Result) -> float:
    return max(
        reference.difference(curve.losses, result.losses),
        reference.difference(curve.gradient_norms, result.gradient_norms),
    )


def test_the_reference_trains_and_clips() -> None:
    result = one_process(Precision.fp32)
    assert result.losses[-1] < result.losses[0] - 0.5
    assert min(result.gradient_norms) > samples.OPTIM.gradient_clip


@pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
def test_fp32_within_four_floors(pool: Pool, stage: int, offload: bool) -> None:
    found = distance(two_processes(pool, stage, offload, Precision.fp32), one_process(Precision.fp32))
    assert found <= 4 * fp32_floor()


@pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
def test_fp64(pool: Pool, stage: int, offload: bool) -> None:
    """ZeRO keeps fp32 masters and gradients; without it everything is float64."""
    found = distance(two_processes(pool, stage, offload, Precision.fp64), one_process(Precision.fp64))
    assert found <= (1e-12 if stage == 0 else 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_no_farther_from_fp32_than_the_reference_in_bf16(pool: Pool, stage: int) -> None:
    seeds = range(5)
    ours = [
        distance(two_processes(pool, stage, False, Precision.bf16, seed), one_process(Precision.fp32, seed))
        for seed in seeds
    ]
    its_own = [
        reference.distance(one_process(Precision.bf16, seed), one_process(Precision.fp32, seed)) for seed in seeds
    ]
    assert fmean(ours) <= 1.25 * fmean(its_own)
