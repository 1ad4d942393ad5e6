"""What a layout costs a rank: bytes that it holds, and bytes that its groups carry in a step. In closed form, measured.

Design choices:
- The forms follow docs/parallelism.md term by term, and are built on the lists of model/spec.py and model/partition.py
  alone: what is held by whom is not asked of an engine.
- A collective is counted by its larger side: the whole of what is gathered or reduced; a message by itself. Groups of
  one rank carry nothing.
- Groups are told apart by their ranks: two that have the same (dp and losses, where there is nothing else) are one.
- Memory is looked at where everything that a step keeps is there: gradients are reduced, and not stepped yet; and once
  more after the step. Storages are counted, so that views and flat buffers count once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatrain.batch import IGNORE
from megatrain.config import (
    DeepSpeedConfig,
    EngineConfig,
    FsdpConfig,
    FsdpShard,
    ModelConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from megatrain.engines.ranges import MASTER
from megatrain.model.partition import Stage, local_shape, stage_parameters, stages
from megatrain.model.spec import Cut, Kind, head_dim
from megatrain.parallel.mesh import Mesh
from tests import samples
from tests.distributed import checking
from tests.distributed.training import LEARNING_RATE, AnyEngine, make_engine, micro_batches, train
from tests.engines.states import resident_bytes

Traffic = Counter[tuple[str, str]]
"""Bytes by group and kind of collective."""

SOURCES = 2
"""Of tests/distributed/training.py's engines."""
MASTER_BYTES, MOMENTS_BYTES, GRADIENT_BYTES = 4, 8, 4


@dataclass(frozen=True)
class Row:
    """A layout, and the step that is taken in it: so many micro-batches on each data-parallel rank."""

    model: ModelConfig
    ranks: int
    parallel: ParallelConfig
    engine: EngineConfig
    precision: Precision
    micro_batches: int = 2
    micro_batch_size: int = 2
    sequence_length: int = 32
    recompute: bool = False

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def weight_bytes(self) -> int:
        """Of an element of a weight, and of an activation."""
        return {Precision.bf16: 2, Precision.fp32: 4, Precision.fp64: 8}[self.precision]

    @property
    def activation_bytes(self) -> int:
        """Hidden states of a micro-batch, at all positions."""
        return self.micro_batch_size * self.sequence_length * self.model.hidden_size * self.weight_bytes


@dataclass(frozen=True)
class Held:
    """A rank's part of a parameter, before data parallelism cuts it."""

    name: str
    kind: Kind
    cut: Cut
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def held(row: Row, stage: Stage) -> list[Held]:
    """What a tensor-parallel rank holds of a stage; all have as much."""
    return [
        Held(p.name, p.kind, p.cut, local_shape(row.model, p, row.parallel.tensor))
        for p in stage_parameters(row.model, stage)
    ]


def stages_of(row: Row, pipeline_rank: int) -> list[Stage]:
    """The stages of a pipeline rank."""
    parallel = row.parallel
    # Divided for the default sequence length, as tests/distributed/training.py does.
    every = stages(row.model, parallel.pipeline * parallel.virtual_stages, TrainConfig.sequence_length)
    return list(every[pipeline_rank :: parallel.pipeline])


def place(row: Row, rank: int) -> tuple[int, int]:
    """Pipeline rank and data rank; tensor-parallel ranks are innermost."""
    rest = rank // row.parallel.tensor
    return rest // row.data_size, rest % row.data_size


# Memory


def memory(row: Row, rank: int) -> Counter[str]:
    """Bytes by category, once gradients are reduced; kept: of gradients, after the step.

    Where weights are masters, or are cast from them when they are gathered, they have no bytes of their own.
    """
    pipeline_rank, data_rank = place(row, rank)
    total: Counter[str] = Counter()
    for stage in stages_of(row, pipeline_rank):
        parts = held(row, stage)
        if isinstance(row.engine, FsdpConfig):
            total += _fsdp_memory(row, parts, data_rank)
        else:
            assert isinstance(row.engine, DeepSpeedConfig)
            total += (_zero0_memory, _zero12_memory, _zero12_memory, _zero3_memory)[row.engine.zero_stage](
                row, parts, data_rank
            )
    return total


def _fsdp_memory(row: Row, parts: list[Held], data_rank: int) -> Counter[str]:
    """Equal rows of each parameter, of which the last ranks have fewer; masters and gradients have memory for all."""
    size = row.data_size // row.parallel.replicate
    padded = sum(-(-part.shape[0] // size) * part.size // part.shape[0] for part in parts)
    own = sum(_own_rows(row, part, data_rank) for part in parts)
    return Counter(masters=MASTER_BYTES * padded, moments=MOMENTS_BYTES * own, gradients=GRADIENT_BYTES * padded)


def _own_rows(row: Row, part: Held, data_rank: int) -> int:
    """Elements of a parameter that FSDP gives a rank."""
    size = row.data_size // row.parallel.replicate
    rows, width = -(-part.shape[0] // size), part.size // part.shape[0]
    return width * max(0, min(rows, part.shape[0] - data_rank % size * rows))


def _zero0_memory(row: Row, parts: list[Held], _: int) -> Counter[str]:
    """Everything whole, in the weights' precision."""
    elements = sum(part.size for part in parts) * row.weight_bytes
    return Counter(masters=elements, moments=2 * elements, gradients=elements)


def flats(parts: list[Held]) -> list[list[Held]]:
    """What ZeRO-1 and 2 lay end to end and cut into equal parts: embeddings, other matrices, and what doesn't decay."""
    groups = (Kind.embedding,), (Kind.matrix,), (Kind.norm, Kind.bias)
    return [group for kinds in groups if (group := [part for part in parts if part.kind in kinds])]


def _partition(row: Row, flat: list[Held]) -> int:
    """Elements of a rank's part of a flat tensor; an even number begins each."""
    return rounded_up(sum(part.size for part in flat), 2 * row.data_size) // row.data_size


def _zero12_memory(row: Row, parts: list[Held], data_rank: int) -> Counter[str]:
    assert isinstance(row.engine, DeepSpeedConfig)
    total: Counter[str] = Counter()
    for flat in flats(parts):
        own = _partition(row, flat)
        total += Counter(
            weights=row.weight_bytes * own * row.data_size, masters=MASTER_BYTES * own, moments=MOMENTS_BYTES * own
        )
        if row.precision is not Precision.bf16:
            # Views of whole gradients: a parameter that a border cuts through is held on both sides of it.
            begin, end = own * data_rank, own * (data_rank + 1)
            cut = sum(part.size for part, first, last in _offsets(flat) if first < end and last > begin)
            total["gradients"] += GRADIENT_BYTES * cut
        elif row.engine.zero_stage == 2:
            total["gradients"] += GRADIENT_BYTES * own
        else:
            # Summed up in fp32 and, until the step, as the last backward left them; whole, both.
            elements = sum(part.size for part in flat)
            total += Counter(gradients=(GRADIENT_BYTES + row.weight_bytes) * elements, kept=GRADIENT_BYTES * elements)
    return total


def _offsets(flat: list[Held]) -> Iterator[tuple[Held, int, int]]:
    """Where each lies in the flat tensor."""
    offset = 0
    for part in flat:
        yield part, offset, offset + part.size
        offset += part.size


def _zero3_memory(row: Row, parts: list[Held], _: int) -> Counter[str]:
    """Each parameter in equal parts; small ones whole besides. A bucket to reduce gradients in."""
    assert isinstance(row.engine, DeepSpeedConfig)
    own = sum(-(-part.size // row.data_size) for part in parts)
    whole = sum(part.size for part in parts if part.size <= row.engine.persistence_elements and row.data_size > 1)
    return Counter(
        weights=row.weight_bytes * (own + whole),
        masters=MASTER_BYTES * own,
        moments=MOMENTS_BYTES * own,
        gradients=GRADIENT_BYTES * own,
        kept=GRADIENT_BYTES * own,
        other=GRADIENT_BYTES * row.engine.bucket_elements,
    )


def layer_activation_bytes(row: Row) -> float:
    """What a layer keeps of a token from forward to backward, where norms and attention are fused kernels."""
    model, w, tensor = row.model, row.weight_bytes, row.parallel.tensor
    if row.recompute:
        return w * model.hidden_size / tensor
    # The norms' inputs, in fp32; what is gathered for qkv and gate_up, of all positions.
    positions = 2 * max(4, w) * model.hidden_size / tensor + 2 * w * model.hidden_size
    # Queries, keys and values of each query head, and the output; gate, up, silu(gate) and the product.
    attention, mlp = 4 * model.num_heads * head_dim(model), 4 * model.intermediate_size
    return positions + w * (attention + mlp) / tensor


# Traffic


def traffic_by_ranks(row: Row, rank: int, groups: dict[str, tuple[int, ...]]) -> Counter[tuple[tuple[int, ...], str]]:
    """`traffic` of the groups that this rank is in, by their ranks."""
    found: Counter[tuple[tuple[int, ...], str]] = Counter()
    for (group, kind), size in traffic(row, rank).items():
        if len(groups.get(group, ())) > 1:
            found[groups[group], kind] += size
    return found


def traffic(row: Row, rank: int) -> Traffic:
    """Bytes of one step by (group, kind), of all groups that exist."""
    pipeline_rank, data_rank = place(row, rank)
    # Loss sums and target counts by source; the square of the norm.
    total: Traffic = Counter({("losses", "all_reduce"): 16 * SOURCES, ("default", "all_reduce"): 8})
    for stage in stages_of(row, pipeline_rank):
        parts = held(row, stage)
        for form in (_tensor_traffic, _pipeline_traffic):
            total += form(row, stage, parts)
        if isinstance(row.engine, FsdpConfig):
            total += _fsdp_traffic(row, stage, parts)
        else:
            total += _zero_traffic(row, stage, parts)
        if row.model.tie_embeddings and row.parallel.pipeline > 1 and (stage.first or stage.last):
            total["ends", "all_reduce"] += _tied_bytes(row, parts, data_rank)
    return total


def _tensor_traffic(row: Row, stage: Stage, parts: list[Held]) -> Traffic:
    """Tensor parallelism with sequence parallelism. Backward, a gather is a reduce-scatter, and the reverse."""
    model, layers, n = row.model, stage.stop - stage.start, row.micro_batches
    # Forward each layer gathers for qkv and gate_up, and scatters what out and down give. Computing it again leaves out
    # what nothing needs any more: the last sum.
    gathers = layers * (2 + 2 * row.recompute) + stage.last
    scatters = layers * (2 + row.recompute) + stage.first
    backward_gathers, backward_scatters = layers * 2 + stage.first, layers * 2 + stage.last
    norms = sum(part.size for part in parts if part.cut is Cut.none and _of_norm(part))
    biases = sum(part.size for part in parts if part.cut is Cut.none and not _of_norm(part))
    tokens = row.micro_batch_size * row.sequence_length
    # Of the cross entropy: a maximum, a sum and the target's logit.
    summed = max(4, row.weight_bytes) * (norms + 3 * tokens * stage.last) + row.weight_bytes * biases
    shared = 2 * head_dim(model) * (model.hidden_size + model.attention_bias) * layers * row.weight_bytes
    return Counter(
        {
            ("tp", "all_gather"): n * (gathers + backward_gathers) * row.activation_bytes,
            ("tp", "reduce_scatter"): n * (scatters + backward_scatters) * row.activation_bytes,
            ("tp", "all_reduce"): n * summed,
            ("kv", "all_reduce"): n * shared,
        }
    )


def _of_norm(part: Held) -> bool:
    """Their gradients are summed in fp32; those of biases after a sum as the weights are."""
    return part.name.split(".")[-2].endswith("norm")


def _pipeline_traffic(row: Row, stage: Stage, _: list[Held]) -> Traffic:
    """Hidden states go on to the next stage, their gradients back; each rank has its positions."""
    neighbours = (not stage.first) + (not stage.last)
    size = row.micro_batches * neighbours * row.activation_bytes // row.parallel.tensor
    return Counter({("pp", "send"): size, ("pp", "recv"): size})


def _zero_traffic(row: Row, stage: Stage, parts: list[Held]) -> Traffic:
    """DeepSpeed's."""
    assert isinstance(row.engine, DeepSpeedConfig)
    n, size, w, zero = row.micro_batches, row.data_size, row.weight_bytes, row.engine.zero_stage
    elements = sum(part.size for part in parts)
    if zero == 0:
        return Counter({("dp", "all_reduce"): w * elements})
    if zero in (1, 2):
        times = n if zero == 2 else 1
        gathered = w * size * sum(_partition(row, flat) for flat in flats(parts))
        return Counter({("dp", "all_reduce"): GRADIENT_BYTES * elements * times, ("dp", "all_gather"): gathered})
    padded = {part: rounded_up(part.size, size) for part in parts}
    large = [part for part in parts if part.size > row.engine.persistence_elements]
    whole = sum(padded.values())
    # The small ones are gathered again when they have changed.
    small = whole - sum(padded[part] for part in large)
    gathered = n * sum(padded[part] * _gathers(row, stage, part) for part in large) + small
    return Counter({("dp", "reduce_scatter"): n * GRADIENT_BYTES * whole, ("dp", "all_gather"): w * gathered})


def _gathers(row: Row, stage: Stage, part: Held) -> int:
    """How often ZeRO-3 gathers a large weight for a micro-batch, at most."""
    assert isinstance(row.engine, DeepSpeedConfig)
    live = row.engine.max_live_elements
    # Once for both forward and backward, where all stays: not in a pipeline, where other micro-batches come between.
    stays = stage.count == 1 and live >= 2 * sum(each.size for each in held(row, stage))
    # Embedding and head may share one: it is needed at both ends, forward and backward.
    shared = stage.count == 1 and row.model.tie_embeddings and part.kind is Kind.embedding
    # Computing a layer again ends in its last weight, which stays for the backward that follows at once.
    again = row.recompute and live == 0 and part.name.startswith("layers.") and ".mlp.down." not in part.name
    return (1 if stays else 4 if shared else 2) + again


def _fsdp_traffic(row: Row, stage: Stage, parts: list[Held]) -> Traffic:
    """FSDP2's."""
    assert isinstance(row.engine, FsdpConfig)
    n, replicate = row.micro_batches, row.parallel.replicate
    size = row.data_size // replicate
    padded = {part: rounded_up(part.shape[0], size) * part.size // part.shape[0] for part in parts}
    # What is needed again as soon as the forward is over isn't freed between: the head, the last norm, a weight
    # that embedding and head share.
    tied = row.model.tie_embeddings and stage.last
    stays = [part for part in parts if part.name.startswith(("head.", "norm.") + (("embedding.",) if tied else ()))]
    often = sum(padded.values()) - sum(padded[part] for part in stays)
    times_often, times_stays = (2 * n, n) if row.engine.shard is FsdpShard.full else (1, 1)
    gathered = times_often * often + times_stays * sum(padded[part] for part in stays)
    reduced = n * GRADIENT_BYTES * sum(padded.values())
    group = "dp" if replicate == 1 else "shard"
    found: Traffic = Counter({(group, "all_gather"): row.weight_bytes * gathered, (group, "reduce_scatter"): reduced})
    if replicate > 1:
        found["replicate", "all_reduce"] = reduced // size
    return found


def _tied_bytes(row: Row, parts: list[Held], data_rank: int) -> int:
    """The gradient of the embedding that this rank steps."""
    (embedding,) = (part for part in parts if part.kind is Kind.embedding)
    if isinstance(row.engine, FsdpConfig):
        return GRADIENT_BYTES * _own_rows(row, embedding, data_rank)
    assert isinstance(row.engine, DeepSpeedConfig)
    if row.engine.zero_stage == 0:
        return row.weight_bytes * embedding.size
    own = _partition(row, [embedding]) if row.engine.zero_stage < 3 else -(-embedding.size // row.data_size)
    return GRADIENT_BYTES * max(0, min(own, embedding.size - data_rank * own))


# Measuring


@dataclass
class Measured:
    """On one rank, in bytes.

    memory: by category, as in `memory`. traffic: of one step, by (ranks of the group, kind). groups: the ranks of each
    group by its name.
    """

    memory: Counter[str]
    traffic: Counter[tuple[tuple[int, ...], str]]
    groups: dict[str, tuple[int, ...]]


def measure(row: Row) -> Measured:
    """The task: two steps, the second of which is looked at. Raises AssertionError if a step changes what is held."""
    before = set(resident_bytes())
    size = row.micro_batch_size * row.micro_batches * row.data_size
    first, second = (samples.batch(size, row.sequence_length, seed, row.model.vocab_size) for seed in range(2))
    engine = make_engine(
        row.engine, row.precision, row.micro_batch_size, row.model, parallel=row.parallel, recompute=row.recompute
    )
    train(engine, [first], row.micro_batch_size)
    slices = micro_batches(second, row.micro_batch_size, engine.mesh)
    count, skip = (second.targets != IGNORE).sum(), torch.tensor(False)
    inputs = [tensor for batch in (first, second, *slices) for tensor in vars(batch).values() if tensor is not None]
    before |= {storage(tensor) for tensor in (*inputs, count, skip)}
    with counted() as carried:
        engine.accumulate(slices, count)
        reduced = {storage(gradient.tensor) for gradient in engine.gradients}
        memory = by_category(engine, before, reduced)
        engine.apply(LEARNING_RATE, skip)
    after = by_category(engine, before, reduced)
    memory["kept"] = after["gradients"]
    unlike = {category for category in ("weights", "masters", "moments") if memory[category] != after[category]}
    assert not unlike, unlike
    memory["other"] = max(memory["other"], after["other"])
    return Measured(memory, carried, groups(engine.mesh))


def storage(tensor: Tensor) -> int:
    """What tells its memory from others'."""
    return int(tensor.untyped_storage()._cdata)


def by_category(engine: AnyEngine, before: set[int], of_gradients: set[int]) -> Counter[str]:
    """Bytes of storages that aren't in `before`, each once. of_gradients: where reduced gradients lie, or lay."""
    left = {storage: size for storage, size in resident_bytes().items() if storage not in before}
    found: Counter[str] = Counter()
    for category, storages in _storages(engine, of_gradients):
        found[category] += sum(left.pop(each, 0) for each in storages)
    found["other"] = sum(left.values())
    return found


def _storages(engine: AnyEngine, of_gradients: set[int]) -> Iterator[tuple[str, set[int]]]:
    states = [shard.tensors for shard in engine.shards()]
    yield "masters", {storage(tensors[MASTER]) for tensors in states}
    yield "moments", {storage(tensor) for tensors in states for state, tensor in tensors.items() if state != MASTER}
    parameters = [parameter for module in engine.modules for parameter in module.parameters()]
    yield "weights", {storage(_local(parameter)) for parameter in parameters}
    yield "weights", {storage(parameter.ds_tensor) for parameter in parameters if hasattr(parameter, "ds_tensor")}
    own = {storage(_local(parameter.grad)) for parameter in parameters if parameter.grad is not None}
    yield "gradients", own | of_gradients


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def counted() -> Iterator[Counter[tuple[tuple[int, ...], str]]]:
    """What the groups of this rank carry within, in any thread."""
    assert checking.checker is not None
    check = checking.checker.check
    carried: Counter[tuple[tuple[int, ...], str]] = Counter()

    def counting(name: str, arguments: dict[str, Any]) -> None:
        check(name, arguments)
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arguments["process_group"])))
        if len(ranks) == 1:
            return
        kind, _ = checking.OPERATIONS.get(name, (name.strip("_"), ""))
        sides = [sum(tensor.nbytes for tensor in checking._tensors([side])) for side in arguments.values()]
        carried[ranks, kind] += max(sides)

    with mock.patch.object(checking.checker, "check", counting):
        yield carried


def groups(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """The ranks of every group that this rank is in."""
    named = {
        "default": dist.group.WORLD,
        "tp": mesh.tensor.group,
        "kv": mesh.tensor.kv_group,
        "dp": mesh.data_group,
        "pp": mesh.pipeline_group,
        "losses": mesh.losses_group,
        "ends": mesh.ends_group,
    }
    if mesh.data.ndim == 2:
        named |= {name: mesh.data.get_group(name) for name in ("replicate", "shard")}
    return {name: tuple(dist.get_process_group_ranks(group)) for name, group in named.items() if group is not None}
