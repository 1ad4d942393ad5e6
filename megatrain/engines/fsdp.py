"""The FSDP engine: PyTorch's fully_shard (FSDP2), behind the engine protocol.

Design choices:
- A layer is what is gathered, freed and reduced at once; so are the embedding and the head, each on its own unless they
  share their weight, which then belongs to the whole module, as the last norm does. Every parameter is cut along
  dimension 0 into equal rows, the last ranks having fewer: one range of law 1.
- Masters are the sharded parameters: fp32, or fp64 at precision=fp64. In bf16 they are cast before they are gathered,
  so no bf16 weight lives between steps.
- Gradients are reduced after every micro-batch, in the masters' precision unless communication_dtype says otherwise,
  and add up in the sharded gradients.
  Reducing once a step would keep whole fp32 gradients: more memory than a sharded master, its moments and gradient.
- Each chunk of the model is a root of its own; all have one optimizer.
- FSDP averages over the ranks; it is told to sum, so that the loss's scale alone is law 3.
- The optimizer steps plain views of the local shards. Shards without elements (a bias of 3 on 8 ranks) have none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatrain import device
from megatrain.batch import Batch, Stats
from megatrain.config import CommunicationDtype, FsdpConfig, FsdpShard, Precision
from megatrain.engines import common, ranges
from megatrain.engines.common import MOMENTS, Gradient
from megatrain.engines.engine import Capabilities, OptimizerFactory
from megatrain.engines.pipeline import Pipeline
from megatrain.engines.ranges import MASTER, Shard, ShardReader
from megatrain.model.transformer import Transformer
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.schedules import INTERLEAVED, ONE_F_ONE_B

# The losses are a view, of which it warns at every forward; an operation in place would harm, and none is done.
warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)


@dataclass
class FsdpChunk:
    """A chunk as the pipeline runs it. unit: the whole chunk's."""

    module: Transformer
    unit: FSDPModule
    keeps_weights: bool

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """See Chunk.forward."""
        y: Tensor = self.module(x, batch.positions, batch.start, batch.end, batch.targets, batch.documents)
        return y

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Chunk.backward."""
        if self.keeps_weights:
            # They were all gathered when the forward ended: keeping them for the next one raises no peak.
            self.unit.set_reshard_after_backward(last)
        loss.backward()  # type: ignore[no-untyped-call]


class FsdpEngine:
    """The engine protocol over torch.distributed.fsdp.fully_shard."""

    capabilities = Capabilities(
        sharding=tuple(shard.value for shard in FsdpShard),
        offload_optimizer=False,
        precisions=("bf16", "fp32", "fp64"),
        schedules=(ONE_F_ONE_B, INTERLEAVED),
    )

    def __init__(self, config: FsdpConfig, precision: Precision, gradient_clip: float, sources: int = 1) -> None:
        """gradient_clip: largest global norm, 0 for none. sources: how many data sources Stats tell apart."""
        self.keeps_weights = config.shard is FsdpShard.gradient
        self.master_dtype = torch.float64 if precision is Precision.fp64 else torch.float32
        bf16 = config.communication_dtype is CommunicationDtype.bf16
        self.mixed_precision = MixedPrecisionPolicy(
            param_dtype=device.DTYPES[precision.value],
            reduce_dtype=torch.bfloat16 if bf16 else self.master_dtype,
            # What a layer gets besides hidden states, such as rotary angles, is in fp32 on purpose.
            cast_forward_inputs=False,
        )
        self.gradient_clip = gradient_clip
        self.sources = sources

    def build(self, chunks: Sequence[Transformer], mesh: Mesh, optimizer_factory: OptimizerFactory) -> None:
        """See Engine.build."""
        self.mesh = mesh
        self.device = device.device()
        self.shard_size = mesh.data.size(-1)
        self.replicas = mesh.data_size // self.shard_size
        self.modules = [chunk.double() if self.master_dtype is torch.float64 else chunk for chunk in chunks]
        self.units: dict[nn.Module, FSDPModule] = {}
        for module in self.modules:
            self.units |= self._shard(module)
            # Each rank gets memory for its shards only.
            module.to_empty(device=self.device)
        self.chunks = [FsdpChunk(module, self.units[module], self.keeps_weights) for module in self.modules]
        self.pipeline = Pipeline(self.chunks, mesh, self.mixed_precision.param_dtype or self.master_dtype)
        self.parts = {name: part for module in self.modules for name, part in module.parts.items()}
        self.sharded = {
            name: parameter
            for module in self.modules
            for name, parameter in module.named_parameters()
            if isinstance(parameter, DTensor)
        }
        for parameter in self.sharded.values():
            # What tensor parallelism pads is in no checkpoint, and has to be 0.
            parameter.to_local().detach().zero_()
        self.masters = {
            name: nn.Parameter(local)
            for name, parameter in self.sharded.items()
            if (local := parameter.to_local().detach()).numel()
        }
        self.optimizer = optimizer_factory(self.masters.items())
        self.gradients: list[Gradient] = []
        self.norm = torch.zeros((), device=self.device)

    def _shard(self, module: Transformer) -> dict[nn.Module, FSDPModule]:
        """Cuts a chunk's parameters. Returns what is gathered at once, the whole chunk last."""
        ends = {name: end for name, end in module.named_children() if name in ("embedding", "head")}
        if module.stage.last and module.config.tie_embeddings:
            # Their weight belongs to the whole chunk.
            ends = {}
        apart = [ends.get("embedding"), *module.layers.values(), ends.get("head")]
        units: dict[nn.Module, FSDPModule] = {}
        for each in (*filter(None, apart), module):
            # The head, and what belongs to the whole chunk, is needed again as soon as the forward is over.
            frees = not self.keeps_weights and each not in (ends.get("head"), module)
            unit = fully_shard(each, mesh=self.mesh.data, reshard_after_forward=frees, mp_policy=self.mixed_precision)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            units[each] = unit
        # What is gathered ahead in backward. By itself FSDP goes by the forwards since the last backward, of
        # which a pipeline has several. The first has nothing before it, which is said by itself: it is there already.
        order = list(units.values())
        for before, unit in zip([order[0], *order], order, strict=False):
            unit.set_modules_to_backward_prefetch([before])
        return units

    def accumulate(self, micro_batches: Sequence[Batch], target_count: Tensor) -> Stats:
        """See Engine.accumulate."""
        sums = common.Sums(self.sources, self.device)
        for module in self.modules:
            module.train()
        self.pipeline.train(micro_batches, common.loss_scale(target_count), sums)
        self.gradients = []
        for name, master in self.masters.items():
            gradient = self.sharded[name].grad
            assert isinstance(gradient, DTensor)
            master.grad = gradient.to_local()
            self.gradients.append(Gradient(name, self._start(name), master.grad.view(-1)))
        if self.modules[0].shares_embedding:
            common.sum_tied(self.gradients, self.mesh, self.device)
        self.norm = common.gradient_norm(self.gradients, self.parts, self.device, self.replicas)
        return sums.reduced(self.mesh, self.norm)

    @torch.no_grad()
    def apply(self, learning_rate: float, skip: Tensor) -> None:
        """See Engine.apply."""
        common.clip(self.gradients, self.norm, self.gradient_clip)
        common.set_step(self.optimizer, learning_rate, skip, self.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for module in self.modules:
            module.zero_grad()
        self.gradients = []

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> Stats:
        """See Engine.evaluate."""
        sums = common.Sums(self.sources, self.device)
        for module in self.modules:
            module.eval()
        self.pipeline.evaluate(micro_batches, sums)
        # What waits for a backward is free again, and the modules have their shards.
        for unit in self.units.values():
            unit.reshard()
        return sums.reduced(self.mesh, None)

    def shards(self) -> Iterable[Shard]:
        """See Engine.shards."""
        replica = self.mesh.data_rank // self.shard_size
        for name, master in self.masters.items():
            state = self.optimizer.state[master]
            tensors = {MASTER: master.detach().view(-1), **{moment: state[moment].view(-1) for moment in MOMENTS}}
            part = self.parts[name]
            yield from ranges.shards_of(name, part, self._start(name), tensors, replica, self.replicas)

    def _start(self, name: str) -> int:
        """The first element of a parameter that this rank has: dimension 0 is cut into equal rows."""
        shape = self.sharded[name].shape
        rows = -(-shape[0] // self.shard_size)
        return self.mesh.data_rank % self.shard_size * rows * shape[1:].numel()

    @torch.no_grad()
    def load_shards(self, reader: ShardReader) -> None:
        """See Engine.load_shards. Weights follow by themselves: every gather reads the masters."""
        common.create_state(self.optimizer, self.masters.values(), reader.optimizer_step)
        for shard in self.shards():
            ranges.load(shard, reader)

    def optimizer_step(self) -> int:
        """See Engine.optimizer_step."""
        return int(self.optimizer.state[next(iter(self.masters.values()))]["step"].item())

    def differing_weights(self) -> str | None:
        """See Engine.differing_weights. Between steps there are no weights but the masters."""
        return None

    def alike(self) -> Iterator[tuple[str, Sequence[Tensor]]]:
        """See Engine.alike. Of the shards those of the replicas, and what tensor parallelism leaves whole."""
        yield common.NORM, [self.norm]
        place = f"of pipeline rank {self.mesh.pipeline_rank}, shard {self.mesh.data_rank % self.shard_size}"
        held = dict(self.masters)
        shared = [name for name in held if self.mesh.tensor.size > 1 and common.is_whole(self.parts[name])]
        yield f"state {place} that tensor parallelism leaves whole", self._state([held.pop(name) for name in shared])
        if self.replicas > 1:
            yield f"state {place}, tensor rank {self.mesh.tensor.rank}", self._state(held.values())

    def _state(self, masters: Iterable[Tensor]) -> list[Tensor]:
        """Masters and their moments."""
        return [tensor for master in masters for tensor in (master, *map(self.optimizer.state[master].get, MOMENTS))]

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[Tensor]]:
        """See Engine.gathered. Gathers whole layers."""
        names = {parameter: name for module in self.modules for name, parameter in module.named_parameters()}
        owners: dict[nn.Parameter, FSDPModule] = {}
        for module, unit in self.units.items():
            # The whole chunk comes last: what no other unit holds is its own.
            for parameter in module.parameters():
                owners.setdefault(parameter, unit)
        units = {owners[parameter] for parameter in parameters}
        for unit in self.units.values():
            # In the same order on every rank.
            if unit in units:
                unit.unshard()
        whole = {name: parameter for module in self.modules for name, parameter in module.named_parameters()}
        try:
            yield [whole[names[parameter]] for parameter in parameters]
        finally:
            for unit in units:
                unit.reshard()
