"""The DeepSpeed engine: ZeRO-0 to 3 and offload of the optimizer, behind the engine protocol.

Design choices:
- DeepSpeed shards, gathers and reduces; the loss's scale, the gradient norm, clipping and the decision to step are ours
  (law 3, law 4). Its JSON is generated from the typed tree; no one writes a second config.
- gradient_accumulation_steps is always 1 in that JSON: otherwise its hooks divide by it. The last micro-batch is marked
  as the boundary instead.
- Gradients are reduced and accumulated in fp32. DeepSpeed averages over the data-parallel ranks, so the loss is
  multiplied by their number.
- Each chunk of the model has a DeepSpeed engine of its own, which is told which ranks hold the same parameters
  (ModelParallelUnit); norm and clipping are over all of them.
- Parameters get memory one layer at a time and are partitioned at once under ZeRO-3, so that no rank ever holds the
  whole model. Their values come from load_shards, at a fresh start too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain import device
from megatrain.batch import Batch, Stats
from megatrain.config import DeepSpeedConfig, Precision
from megatrain.engines import common, deepspeed_internals, ranges
from megatrain.engines.common import Gradient
from megatrain.engines.deepspeed_internals import Adapter
from megatrain.engines.engine import Capabilities, OptimizerFactory
from megatrain.engines.pipeline import Pipeline
from megatrain.engines.ranges import Shard, ShardReader
from megatrain.model.transformer import Transformer
from megatrain.parallel.mesh import Mesh
from megatrain.parallel.schedules import INTERLEAVED, ONE_F_ONE_B


def json_config(
    config: DeepSpeedConfig, precision: Precision, micro_batch_size: int, pipeline: bool = False
) -> dict[str, Any]:
    """DeepSpeed's own configuration, from the typed tree. pipeline: whether there is one."""
    overlaps = not pipeline if config.overlap_communication is None else config.overlap_communication
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": overlaps and device.accelerator() is not None,
        "reduce_bucket_size": config.bucket_elements,
        # DeepSpeed wants it even.
        "allgather_bucket_size": config.bucket_elements + config.bucket_elements % 2,
    }
    if config.zero_stage in (1, 2):
        # Stage 1 in bf16 becomes BF16_Optimizer, whose norm is replaced; offload can't be told to leave it out.
        becomes_bf16_optimizer = config.zero_stage == 1 and precision is Precision.bf16
        zero["compute_grad_norm"] = config.offload_optimizer or becomes_bf16_optimizer
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": config.prefetch_elements,
            "stage3_max_live_parameters": config.max_live_elements,
            # Without it the former bounds prefetching alone: what is used again this soon stays gathered.
            "stage3_max_reuse_distance": config.max_live_elements,
            "stage3_param_persistence_threshold": config.persistence_elements,
            # It would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.accelerator() is not None}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": precision is Precision.bf16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": config.communication_dtype.value,
        # The client's fused AdamW: no compilation at start, and found_inf skips a step on the device.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


@dataclass(frozen=True)
class ModelParallelUnit:
    """What DeepSpeed asks about ranks: only those of `data_group` hold the same parameters."""

    mesh: Mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks to shard, gather and reduce over."""
        return self.mesh.data_group

    def get_data_parallel_rank(self) -> int:
        """This rank's number among them."""
        return self.mesh.data_rank

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self.mesh.data_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the other parts of the model."""
        return self.mesh.model_group

    def get_model_parallel_rank(self) -> int:
        """This rank's number among them."""
        return self.mesh.model_group.rank()

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self.mesh.model_group.size()


class DeepSpeedEngine:
    """The engine protocol over deepspeed.initialize."""

    capabilities = Capabilities(
        sharding=(0, 1, 2, 3),
        offload_optimizer=True,
        precisions=("bf16", "fp32", "fp64"),
        schedules=(ONE_F_ONE_B, INTERLEAVED),
    )

    def __init__(
        self,
        config: DeepSpeedConfig,
        precision: Precision,
        micro_batch_size: int,
        gradient_clip: float,
        sources: int = 1,
    ) -> None:
        """gradient_clip: largest global norm, 0 for none. sources: how many data sources Stats tell apart."""
        deepspeed_internals.check_version()
        self.config = config
        self.dtype = device.DTYPES[precision.value]
        self.precision = precision
        self.micro_batch_size = micro_batch_size
        self.gradient_clip = gradient_clip
        self.sources = sources

    def build(self, chunks: Sequence[Transformer], mesh: Mesh, optimizer_factory: OptimizerFactory) -> None:
        """See Engine.build."""
        self.mesh = mesh
        self.device = device.device()
        self.json = json_config(self.config, self.precision, self.micro_batch_size, mesh.pipeline_size > 1)
        # Its shared-memory collectives for the CPU would be compiled at the first start (50 s).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=device.backend(), dist_init_required=False, verbose=False)
        deepspeed_internals.replace_functions()
        self.modules = list(chunks)
        self.chunks = [self._initialize(module, optimizer_factory) for module in chunks]
        self.pipeline = Pipeline(self.chunks, mesh, self.dtype)
        self.parts = {name: part for module in chunks for name, part in module.parts.items()}
        self.gradients: list[Gradient] = []
        self.norm = torch.zeros((), device=self.device)

    def _initialize(self, module: Transformer, optimizer_factory: OptimizerFactory) -> Adapter:
        self._give_memory(module)
        optimizer = optimizer_factory(module.named_parameters())
        unit = ModelParallelUnit(self.mesh)
        # BF16_Optimizer prints the machine's memory around every parameter group.
        with redirect_stdout(None):
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.json, mpu=unit)
        return deepspeed_internals.adapt(engine)

    def _give_memory(self, module: nn.Module) -> None:
        """Replaces meta parameters by zeros on the device, tied ones by one; ZeRO-3 partitions as it goes."""
        real: dict[nn.Parameter, nn.Parameter] = {}
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter not in real:
                    zeros = torch.zeros(parameter.shape, dtype=self.dtype, device=self.device)
                    real[parameter] = nn.Parameter(zeros)
                setattr(owner, name, real[parameter])
            if self.config.zero_stage == 3 and any(True for _ in owner.parameters(recurse=False)):
                deepspeed.zero.Init(
                    module=owner,
                    config_dict_or_path=self.json,
                    dtype=self.dtype,
                    data_parallel_group=self.mesh.data_group,
                )

    def accumulate(self, micro_batches: Sequence[Batch], target_count: Tensor) -> Stats:
        """See Engine.accumulate."""
        sums = common.Sums(self.sources, self.device)
        for chunk in self.chunks:
            chunk.engine.train()
        self.pipeline.train(micro_batches, common.loss_scale(target_count, divided_by=self.mesh.data_size), sums)
        for chunk in self.chunks:
            chunk.reduce()
        self.gradients = [gradient for chunk in self.chunks for gradient in chunk.gradients()]
        if self.modules[0].shares_embedding:
            common.sum_tied(self.gradients, self.mesh, self.device)
        self.norm = common.gradient_norm(self.gradients, self.parts, self.device, self.chunks[0].copies)
        return sums.reduced(self.mesh, self.norm)

    @torch.no_grad()
    def apply(self, learning_rate: float, skip: Tensor) -> None:
        """See Engine.apply."""
        # Where the optimizer steps on the host (offload), the coefficient and `skip` are read from the device.
        common.clip(self.gradients, self.norm, self.gradient_clip)
        for chunk in self.chunks:
            common.set_step(chunk.inner, learning_rate, skip, chunk.flats()[0].device)
            chunk.engine.set_gradient_accumulation_boundary(True)
            chunk.engine.step()
        self.gradients = []

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> Stats:
        """See Engine.evaluate."""
        sums = common.Sums(self.sources, self.device)
        for chunk in self.chunks:
            chunk.engine.eval()
        self.pipeline.evaluate(micro_batches, sums)
        for chunk in self.chunks:
            chunk.after_forwards()
        return sums.reduced(self.mesh, None)

    def shards(self) -> Iterable[Shard]:
        """See Engine.shards."""
        return (shard for chunk in self.chunks for shard in chunk.shards())

    @torch.no_grad()
    def load_shards(self, reader: ShardReader) -> None:
        """See Engine.load_shards."""
        for chunk in self.chunks:
            common.create_state(chunk.inner, chunk.flats(), reader.optimizer_step)
            chunk.before_load()
            for shard in chunk.shards():
                ranges.load(shard, reader)
            chunk.after_load()

    def optimizer_step(self) -> int:
        """See Engine.optimizer_step."""
        chunk = self.chunks[0]
        return int(chunk.inner.state[chunk.flats()[0]]["step"].item())

    def differing_weights(self) -> str | None:
        """See Engine.differing_weights."""
        return common.differing_weights(held for chunk in self.chunks for held in chunk.weights())

    def alike(self) -> Iterator[tuple[str, Sequence[Tensor]]]:
        """See Engine.alike. Weights that ZeRO-3 has cut are on one rank only."""
        yield common.NORM, [self.norm]
        held = {name: weights for chunk in self.chunks for name, weights in chunk.whole_weights()}
        stage = f"of pipeline rank {self.mesh.pipeline_rank}"
        shared = [name for name in held if self.mesh.tensor.size > 1 and common.is_whole(self.parts[name])]
        yield f"weights {stage} that tensor parallelism leaves whole", [held.pop(name) for name in shared]
        yield f"weights {stage}, tensor rank {self.mesh.tensor.rank}", list(held.values())

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[Tensor]]:
        """See Engine.gathered."""
        with deepspeed.zero.GatheredParameters(list(parameters), enabled=self.config.zero_stage == 3):
            yield parameters
