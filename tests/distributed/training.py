"""What ranks of the pool run to train a few steps on an engine, by the same slices as the loader's."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain import optimizer
from megatrain.batch import IGNORE, Batch
from megatrain.config import (
    ActivationCheckpointing,
    EngineConfig,
    KernelsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from megatrain.data.slots import slots
from megatrain.engines import select
from megatrain.engines.deepspeed import DeepSpeedEngine
from megatrain.engines.fsdp import FsdpEngine
from megatrain.engines.ranges import ShardReader
from megatrain.model.choice import TORCH
from megatrain.model.initialization import InitialWeights
from megatrain.parallel import mesh as meshes
from megatrain.parallel.mesh import Mesh
from megatrain.train import chunks
from tests import samples

LEARNING_RATE = 1e-3

AnyEngine = DeepSpeedEngine | FsdpEngine


@dataclass
class Curve:
    """Loss and gradient norm of each step."""

    losses: list[float]
    gradient_norms: list[float]


def make_engine(
    engine: EngineConfig,
    precision: Precision,
    micro_batch_size: int = 1,
    model: ModelConfig = samples.MODEL,
    optim: OptimConfig = samples.OPTIM,
    reader: ShardReader | None = None,
    seed: int = 0,
    parallel: ParallelConfig | None = None,
    recompute: bool = False,
    kernels: KernelsConfig = TORCH,
) -> AnyEngine:
    """An engine on this rank, loaded from `reader` or with initial weights."""
    made = select.make(engine, precision, micro_batch_size, optim.gradient_clip, sources=2)
    assert isinstance(made, AnyEngine)
    checkpointing = ActivationCheckpointing.full if recompute else ActivationCheckpointing.none
    config = TrainConfig(model=model, activation_checkpointing=checkpointing, parallel=parallel or ParallelConfig())
    mesh = meshes.build(config.parallel, model.num_kv_heads)
    made.build(chunks(config, mesh, kernels), mesh, lambda parameters: optimizer.build(optim, model, parameters))
    made.load_shards(reader or InitialWeights(model, seed))
    return made


def micro_batches(batch: Batch, micro_batch_size: int, mesh: Mesh) -> list[Batch]:
    """This rank's slices of a global batch."""
    taken = slots(len(batch.input_ids), micro_batch_size, mesh.data_size, mesh.data_rank)
    return [samples.rows(batch, int(row[0]), int(row[0]) + micro_batch_size) for row in taken]


def train(
    engine: AnyEngine, batches: list[Batch], micro_batch_size: int, learning_rate: float = LEARNING_RATE
) -> Curve:
    """A step for each global batch."""
    curve = Curve([], [])
    for batch in (on_host.to(engine.device) for on_host in batches):
        count = (batch.targets != IGNORE).sum()
        stats = engine.accumulate(micro_batches(batch, micro_batch_size, engine.mesh), count)
        assert stats.gradient_norm is not None
        engine.apply(learning_rate, skip=count == 0)
        curve.losses.append(float(stats.loss()))
        curve.gradient_norms.append(float(stats.gradient_norm))
    return curve


def train_from_start(
    engine: EngineConfig,
    precision: Precision,
    batches: list[Batch],
    micro_batch_size: int,
    seed: int = 0,
    model: ModelConfig = samples.MODEL,
    parallel: ParallelConfig | None = None,
    recompute: bool = False,
    kernels: KernelsConfig = TORCH,
) -> Curve:
    """The whole of it, as a task of the pool."""
    made = make_engine(
        engine, precision, micro_batch_size, model, seed=seed, parallel=parallel, recompute=recompute, kernels=kernels
    )
    return train(made, batches, micro_batch_size)
