"""Law 4 with every kernel ours, in the interpreter: a run trains the numbers of PyTorch's own operations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from megatrain.batch import Batch
from megatrain.compose import compose
from megatrain.config import (
    AttentionKernel,
    DeepSpeedConfig,
    EngineConfig,
    FsdpConfig,
    Kernel,
    KernelsConfig,
    LossKernel,
    ModelConfig,
    Norm,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from megatrain.model.choice import TORCH
from tests import reference, samples
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, train_from_start

pytestmark = pytest.mark.kernels

TRITON = KernelsConfig(AttentionKernel.triton, Kernel.triton, Kernel.triton, Kernel.triton, LossKernel.triton)
MODEL = replace(samples.MODEL, num_layers=1, qk_norm=False)
"""Rotated in place. The layouts' has norms of queries and keys instead, and LayerNorm with its bias."""
OTHER = replace(samples.MODEL, num_layers=2, norm=Norm.layer)


def batches(steps: int, size: int) -> list[Batch]:
    return [samples.batch(size, sequence_length=16, seed=step) for step in range(steps)]


def tiny() -> ModelConfig:
    config: TrainConfig | None = compose("train", ["model=tiny", "run_dir=none", "max_steps=20", "data.path=none"])
    assert config is not None
    return config.model


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", [MODEL, pytest.param(tiny(), marks=pytest.mark.long)], ids=lambda m: m.name)
def test_twenty_steps(model: ModelConfig) -> None:
    # Eight samples: law 4's floor is over micro-batches of 1, 2, 4 and 8.
    steps = [samples.batch(8, sequence_length=8, seed=step, vocab_size=model.vocab_size) for step in range(20)]
    rates = [LEARNING_RATE] * len(steps)

    def train(micro_batch_size: int, kernels: KernelsConfig = TORCH) -> reference.Result:
        return reference.train(model, samples.OPTIM, steps, rates, micro_batch_size, kernels=kernels)

    expected = train(8)
    assert min(expected.gradient_norms) > samples.OPTIM.gradient_clip
    assert 0 < reference.distance(train(8, TRITON), expected) <= 4 * reference.floor(train)


@dataclass(frozen=True)
class Layout:
    """What a kernel meets in training: how weights, sequences and layers are divided, and what is computed again."""

    engine: EngineConfig
    ranks: int = 2
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: bool = False


LAYOUTS = {
    "zero3": Layout(DeepSpeedConfig(zero_stage=3, persistence_elements=100), recompute=True),
    "tensor parallel": Layout(FsdpConfig(), parallel=ParallelConfig(tensor=2)),
    "zero3 in a pipeline": Layout(
        DeepSpeedConfig(zero_stage=3, persistence_elements=100), ranks=2, parallel=ParallelConfig(pipeline=2)
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(pool: Pool, name: str) -> None:
    layout = LAYOUTS[name]
    steps = batches(2, size=2)
    expected = reference.train(OTHER, samples.OPTIM, steps, [LEARNING_RATE] * len(steps), 1)
    curve, *others = pool.run(
        train_from_start,
        ranks=layout.ranks,
        timeout=120,
        engine=layout.engine,
        precision=Precision.fp32,
        batches=steps,
        micro_batch_size=1,
        model=OTHER,
        parallel=layout.parallel,
        recompute=layout.recompute,
        kernels=TRITON,
    )
    assert others == [curve] * (layout.ranks - 1)
    found = reference.Result(curve.losses, curve.gradient_norms, {})
    assert reference.distance(found, expected) <= 1e-6
