"""What ranks of the pool run to train a few steps on an engine, by the same slices as the loader's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatrain import optimizer
from megatrain.batch import IGNORE, Batch
from megatrain.config import EngineConfig, ModelConfig, OptimConfig, ParallelConfig, Precision
from megatrain.data.slots import slots
from megatrain.engines import select
from megatrain.engines.deepspeed import DeepSpeedEngine
from megatrain.engines.fsdp import FsdpEngine
from megatrain.engines.ranges import ShardReader
from megatrain.model.initialization import InitialWeights
from megatrain.model.transformer import Transformer
from megatrain.parallel import mesh as meshes
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
) -> AnyEngine:
    """An engine on this rank, loaded from `reader` or with initial weights."""
    made = select.make(engine, precision, micro_batch_size, optim.gradient_clip, sources=2)
    assert isinstance(made, AnyEngine)
    with torch.device("meta"):
        module = Transformer(model)
    made.build([module], meshes.build(ParallelConfig()), lambda parameters: optimizer.build(optim, model, parameters))
    made.load_shards(reader or InitialWeights(model, seed))
    return made


def micro_batches(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """This rank's slices of a global batch."""
    taken = slots(len(batch.input_ids), micro_batch_size, dist.get_world_size(), dist.get_rank())
    return [samples.rows(batch, int(row[0]), int(row[0]) + micro_batch_size) for row in taken]


def train(
    engine: AnyEngine, batches: list[Batch], micro_batch_size: int, learning_rate: float = LEARNING_RATE
) -> Curve:
    """A step for each global batch."""
    curve = Curve([], [])
    for batch in (on_host.to(engine.device) for on_host in batches):
        count = (batch.targets != IGNORE).sum()
        stats = engine.accumulate(micro_batches(batch, micro_batch_size), count)
        assert stats.gradient_norm is not None
        engine.apply(learning_rate, skip=torch.zeros((), dtype=torch.bool, device=engine.device))
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
) -> Curve:
    """The whole of it, as a task of the pool."""
    made = make_engine(engine, precision, micro_batch_size, model, seed=seed)
    return train(made, batches, micro_batch_size)
