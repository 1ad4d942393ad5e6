"""Law 4: both engines, however they shard, train on two processes the numbers of one process.

Target counts are unequal among ranks and micro-batches, the ranks don't divide the global batch, and clipping is active
at every step. The learning rate is one at which rounding isn't amplified: the reference's own floor stays at its least.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import fmean

import pytest

from megatrain.batch import Batch
from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, FsdpShard, ModelConfig, Precision
from tests import reference, samples
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, Curve, train_from_start

pytestmark = pytest.mark.distributed

STEPS = 20
RANKS = 2
TIED = replace(samples.MODEL, tie_embeddings=True)


def zero(stage: int, offload: bool = False) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=stage, offload_optimizer=offload, persistence_elements=100)


ENGINES: dict[str, EngineConfig] = {
    "zero0": zero(0),
    "zero1": zero(1),
    "zero1-offload": zero(1, offload=True),
    "zero2": zero(2),
    "zero2-offload": zero(2, offload=True),
    "zero3": zero(3),
    "zero3-offload": zero(3, offload=True),
    "fsdp-full": FsdpConfig(shard=FsdpShard.full),
    "fsdp-gradient": FsdpConfig(shard=FsdpShard.gradient),
}


def global_batches(seed: int = 0) -> list[Batch]:
    return [samples.batch(samples=7, sequence_length=32, seed=1000 * seed + step) for step in range(STEPS)]


@cache
def one_process(precision: Precision, seed: int = 0, micro_batch_size: int = 7, tied: bool = False) -> reference.Result:
    rates = [LEARNING_RATE] * STEPS
    batches = global_batches(seed)
    model = TIED if tied else samples.MODEL
    return reference.train(model, samples.OPTIM, batches, rates, micro_batch_size, precision, seed)


@cache
def fp32_floor(tied: bool = False) -> float:
    return reference.floor(lambda size: one_process(Precision.fp32, micro_batch_size=size, tied=tied))


def two_processes(
    pool: Pool, engine: str, precision: Precision, seed: int = 0, model: ModelConfig = samples.MODEL
) -> Curve:
    curves = pool.run(
        train_from_start,
        ranks=RANKS,
        engine=ENGINES[engine],
        precision=precision,
        batches=global_batches(seed),
        micro_batch_size=2,
        seed=seed,
        model=model,
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


@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_within_four_floors(pool: Pool, engine: str) -> None:
    found = distance(two_processes(pool, engine, Precision.fp32), one_process(Precision.fp32))
    assert found <= 4 * fp32_floor()


@pytest.mark.parametrize("engine", ["zero3", "fsdp-full", "fsdp-gradient"])
def test_tied_embeddings(pool: Pool, engine: str) -> None:
    found = distance(two_processes(pool, engine, Precision.fp32, model=TIED), one_process(Precision.fp32, tied=True))
    assert found <= 4 * fp32_floor(tied=True)


def test_shards_without_elements(pool: Pool) -> None:
    """Norms of two elements on three ranks: the last holds none of them."""
    model = replace(samples.MODEL, hidden_size=8, head_dim=2, num_layers=1)
    rates = [LEARNING_RATE] * STEPS
    expected = reference.train(model, samples.OPTIM, global_batches(), rates, 7, Precision.fp64)
    curve, *others = pool.run(
        train_from_start,
        ranks=3,
        engine=ENGINES["fsdp-full"],
        precision=Precision.fp64,
        batches=global_batches(),
        micro_batch_size=2,
        model=model,
    )
    assert others == [curve, curve]
    assert distance(curve, expected) <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_fp64(pool: Pool, engine: str) -> None:
    """ZeRO keeps fp32 masters and gradients; without it everything is float64."""
    found = distance(two_processes(pool, engine, Precision.fp64), one_process(Precision.fp64))
    assert found <= (1e-6 if engine.startswith("zero") and engine != "zero0" else 1e-12)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp-full", "fsdp-gradient"])
def test_bf16_is_no_farther_from_fp32_than_the_reference_in_bf16(pool: Pool, engine: str) -> None:
    seeds = range(5)
    ours = [
        distance(two_processes(pool, engine, Precision.bf16, seed), one_process(Precision.fp32, seed)) for seed in seeds
    ]
    its_own = [
        reference.distance(one_process(Precision.bf16, seed), one_process(Precision.fp32, seed)) for seed in seeds
    ]
    assert fmean(ours) <= 1.25 * fmean(its_own)
