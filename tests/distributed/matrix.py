"""Law 4 in rows: every engine in every layout and precision, against one process.

Design choices:
- A layout brings its own options (tied embeddings, biases, a skipped step, activation checkpointing), so each is on in
  several rows without a dimension of its own. Everywhere: documents, grouped queries, unequal target counts, a global
  batch of 7 that no number of ranks divides, accumulation, and clipping at every step.
- bf16 takes five seeds, trained by one task.
- The reference is computed once for each model and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, partial
from statistics import fmean

from megatrain.batch import Batch
from megatrain.config import (
    DeepSpeedConfig,
    EngineConfig,
    FsdpConfig,
    FsdpShard,
    ParallelConfig,
    Precision,
)
from tests import reference, samples
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, Curve, train_from_start

STEPS = 20
SKIPPED = 3
"""The step without targets, where one is skipped."""
SEEDS = 5

MODEL = replace(samples.MODEL, num_layers=4)
MODELS = {
    "plain": MODEL,
    "tied": replace(MODEL, tie_embeddings=True),
    "biases": replace(MODEL, attention_bias=True, mlp_bias=True),
}


def zero(stage: int, offload: bool = False) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=stage, offload_optimizer=offload, persistence_elements=100)


ENGINES: dict[str, EngineConfig] = {
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "fsdp-full": FsdpConfig(shard=FsdpShard.full),
    "fsdp-gradient": FsdpConfig(shard=FsdpShard.gradient),
    "zero1-offload": zero(1, offload=True),
    "zero2-offload": zero(2, offload=True),
    "zero3-offload": zero(3, offload=True),
}


@dataclass(frozen=True)
class Layout:
    """ranks: all of them. micro_batch_size: samples. skip: one step has no targets. recompute: of activations.

    model: of MODELS.
    """

    ranks: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 2
    model: str = "plain"
    skip: bool = False
    recompute: bool = False


def interleaved(**parallel: int) -> ParallelConfig:
    return ParallelConfig(pipeline=2, virtual_stages=2, schedule="interleaved_1f1b", **parallel)


LAYOUTS = {
    "dp2": Layout(2, skip=True),
    "dp4": Layout(4, model="tied"),
    "tp2": Layout(2, ParallelConfig(tensor=2), micro_batch_size=4, model="tied"),
    "tp4": Layout(4, ParallelConfig(tensor=4), micro_batch_size=4, model="biases"),
    "pp2": Layout(2, ParallelConfig(pipeline=2), model="tied"),
    "pp4": Layout(4, ParallelConfig(pipeline=4), micro_batch_size=1, recompute=True),
    "tp2 dp2": Layout(4, ParallelConfig(tensor=2), recompute=True),
    "pp2 dp2": Layout(4, ParallelConfig(pipeline=2), micro_batch_size=1, skip=True),
    "tp2 pp2": Layout(4, ParallelConfig(tensor=2, pipeline=2), micro_batch_size=4, recompute=True),
    "pp2 dp2 tp2": Layout(8, ParallelConfig(tensor=2, pipeline=2), model="tied"),
    "interleaved pp2 dp2": Layout(4, interleaved(), micro_batch_size=1, model="tied"),
    "replicate2 dp4": Layout(4, ParallelConfig(replicate=2), recompute=True),
    "interleaved pp2 tp2": Layout(4, interleaved(tensor=2), micro_batch_size=4, skip=True, recompute=True),
}

OFFLOADED = ("dp2", "tp2 dp2", "pp2 dp2", "interleaved pp2 dp2")


@dataclass(frozen=True)
class Row:
    """One cell of the matrix, by the names above."""

    engine: str
    layout: str
    precision: Precision

    def __str__(self) -> str:
        return f"{self.engine} {self.layout} {self.precision.value}"

    @property
    def legal(self) -> bool:
        """What megatrain.layout and megatrain.checks let pass."""
        if self.engine == "zero0" and self.precision is Precision.bf16:
            return False
        if self.layout.startswith("replicate") and not self.engine.startswith("fsdp"):
            return False
        return not self.engine.endswith("offload") or self.layout in OFFLOADED


ROWS = [
    row
    for layout in LAYOUTS
    for engine in ENGINES
    for row in (Row(engine, layout, precision) for precision in Precision)
    if row.legal
]


def global_batches(seed: int, skip: bool) -> list[Batch]:
    batches = [samples.batch(samples=7, sequence_length=32, seed=1000 * seed + step) for step in range(STEPS)]
    if skip:
        batches[SKIPPED] = samples.empty_like(batches[SKIPPED])
    return batches


@cache
def one_process(
    model: str, skip: bool, precision: Precision, seed: int = 0, micro_batch_size: int = 7
) -> reference.Result:
    rates = [LEARNING_RATE] * STEPS
    batches = global_batches(seed, skip)
    return reference.train(MODELS[model], samples.OPTIM, batches, rates, micro_batch_size, precision, seed)


@cache
def floor(model: str, skip: bool) -> float:
    return reference.floor(lambda size: one_process(model, skip, Precision.fp32, micro_batch_size=size))


@dataclass(frozen=True)
class Found:
    """How far a row is from one process, and what law 4 allows."""

    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


def train(engine: str, layout: Layout, precision: Precision, seeds: int) -> list[Curve]:
    """The task: the curve of each seed, on one rank."""
    return [
        train_from_start(
            ENGINES[engine],
            precision,
            global_batches(seed, layout.skip),
            layout.micro_batch_size,
            seed,
            MODELS[layout.model],
            layout.parallel,
            layout.recompute,
        )
        for seed in range(seeds)
    ]


def measure(pool: Pool, row: Row) -> Found:
    """Trains the row on real ranks. Raises AssertionError where Stats differ between ranks."""
    layout, precision = LAYOUTS[row.layout], row.precision
    seeds = SEEDS if precision is Precision.bf16 else 1
    curves = pool.run(
        train, ranks=layout.ranks, timeout=100.0, engine=row.engine, layout=layout, precision=precision, seeds=seeds
    )
    assert all(of_rank == curves[0] for of_rank in curves), "Stats have to be equal on every rank"
    expected = partial(one_process, layout.model, layout.skip)
    if precision is Precision.bf16:
        exact = [expected(Precision.fp32, seed) for seed in range(seeds)]
        its_own = fmean(reference.distance(expected(precision, i), exact[i]) for i in range(seeds))
        return Found(fmean(distance(curves[0][i], exact[i]) for i in range(seeds)), 1.25 * its_own)
    found = distance(curves[0][0], expected(precision))
    if precision is Precision.fp32:
        return Found(found, 4 * floor(layout.model, layout.skip))
    # ZeRO keeps fp32 masters and gradients; without it everything is float64.
    keeps_fp32 = row.engine.startswith("zero") and row.engine != "zero0"
    return Found(found, 1e-6 if keeps_fp32 else 1e-12)


def distance(curve: Curve, result: reference.Result) -> float:
    """The larger of the largest differences of loss and of gradient norm."""
    return max(
        reference.difference(curve.losses, result.losses),
        reference.difference(curve.gradient_norms, result.gradient_norms),
    )
