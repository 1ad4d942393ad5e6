"""The engine protocol: who owns forward, backward, norm, clipping and step.

Design choices:
- accumulate and apply are apart, so that whether to step is decided between them from Stats, on the device.
- Stats are device tensors equal on every rank: a rank decides alone and all decide alike, without a host read.
- State comes and goes as the ranges of law 1; a fresh start is a load of the initial weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatrain.batch import Batch, Stats
from megatrain.engines.ranges import Shard, ShardReader
from megatrain.model.transformer import Transformer
from megatrain.parallel.mesh import Mesh

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
"""Makes the optimizer from (name, parameter) pairs. It must be fused, so that found_inf skips a step on the device."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do, for the check at start and docs/parallelism.md."""

    sharding: tuple[int | str, ...]
    """Values of engine.zero_stage or engine.shard."""
    offload_optimizer: bool
    precisions: tuple[str, ...]
    schedules: tuple[str, ...]


class Engine(Protocol):
    """Trains the model chunks of this rank."""

    capabilities: Capabilities

    def build(self, chunks: Sequence[Transformer], mesh: Mesh, optimizer_factory: OptimizerFactory) -> None:
        """Takes the modules of this rank (on the meta device), gives them memory and shards them.

        Weights are undefined until load_shards.
        """
        ...

    def accumulate(self, micro_batches: Sequence[Batch], target_count: Tensor) -> Stats:
        """Forward and backward over all micro-batches of this rank, and the gradient norm.

        target_count: 0-dim int64 on the device, the targets of the whole global batch; each token loss is divided by
        it (law 3). The gradients stay with the engine until apply.
        """
        ...

    def apply(self, learning_rate: float, skip: Tensor) -> None:
        """Clips and steps; where `skip` (0-dim bool on the device) is true nothing changes."""
        ...

    def evaluate(self, micro_batches: Iterable[Batch]) -> Stats:
        """The sums of the losses, without gradients. Every rank gives the same number of micro-batches."""
        ...

    def shards(self) -> Iterable[Shard]:
        """Live views of the masters and moments that this rank holds; no collective."""
        ...

    def load_shards(self, reader: ShardReader) -> None:
        """Fills them and refreshes the weights, so that the next step is right. Every rank calls it."""
        ...

    def optimizer_step(self) -> int:
        """Steps that the optimizer has taken, skipped ones left out. Reads the device: for checkpoints only."""
        ...

    def differing_weights(self) -> str | None:
        """The name of a parameter whose weights on this rank aren't its masters in the precision that is computed in.

        To the bit; None: all are. Of the ranges that this rank steps; no collective. Reads the device: for saving,
        since a checkpoint keeps the masters and no weights.
        """
        ...

    def alike(self) -> Iterable[tuple[str, Sequence[Tensor]]]:
        """Live views of what other ranks hold to the bit between steps, and in which words.

        Ranks that say the same words hold the same, in the same order. No collective, no read of the device.
        """
        ...

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Sequence[Tensor]]:
        """Gives `parameters` (of the module, between steps) whole, in the same order, on every rank; to be read only.

        The tensors are valid while it is open. Collective.
        """
        ...
