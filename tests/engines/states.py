"""Looking at the state of an engine from outside: copies, the whole of it over all ranks, weights against masters."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatrain.checkpoint.index import Row, merge
from megatrain.engines.ranges import MASTER
from tests.distributed.training import AnyEngine

State = dict[str, Tensor]


@dataclass(frozen=True)
class WholeState:
    """Masters and moments of the whole model in memory: a ShardReader. tensors: by (state, name), 1-D."""

    optimizer_step: int
    tensors: dict[tuple[str, str], Tensor]

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[state, name][start:stop]


def parameters_of(engine: AnyEngine) -> dict[str, nn.Parameter]:
    """Those of all chunks on this rank."""
    return {name: parameter for module in engine.modules for name, parameter in module.named_parameters()}


def snapshot(engine: AnyEngine) -> State:
    """Copies of everything on this rank that a step changes: masters, moments, weights and the step count."""
    copies = {
        f"{state} {shard.name} {shard.ranges}": tensor.clone()
        for shard in engine.shards()
        for state, tensor in shard.tensors.items()
    }
    for name, parameter in parameters_of(engine).items():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        copies[f"weight {name}"] = local.detach().clone()
        if hasattr(parameter, "ds_tensor"):
            # A part behind the parameter's end is uninitialised memory, which may hold a NaN.
            part = parameter.ds_tensor.numel()
            elements: int = parameter.ds_numel  # type: ignore[attr-defined]
            real = max(0, min(part, elements - part * dist.get_rank()))
            copies[f"part {name}"] = parameter.ds_tensor.detach()[:real].clone()
    copies["step"] = torch.tensor(engine.optimizer_step())
    return copies


def same(a: State, b: State) -> bool:
    """Whether they are equal bit for bit (of equal values; a NaN equals nothing)."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def whole(engine: AnyEngine) -> WholeState:
    """The state of all ranks. Collective. Raises BrokenCheckpoint where ranges overlap or elements are missing."""
    mine = [
        (Row(0, state, shard.name, shard.shape, str(tensor.dtype), start, stop, 0), tensor.clone())
        for shard in engine.shards()
        for state, tensor in shard.tensors.items()
        for ((start, stop),) in [shard.ranges]
        if shard.replica == 0
    ]
    of_all: list[list[tuple[Row, Tensor]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, mine)
    held = {(row.state, row.name, row.start): tensor for part in of_all for row, tensor in part}
    index = merge(row for part in of_all for row, _ in part)
    tensors = {key: torch.cat([held[(*key, start)] for start in ranges.start]) for key, ranges in index.items()}
    return WholeState(engine.optimizer_step(), tensors)


def weights_follow_masters(engine: AnyEngine) -> bool:
    """Whether every weight is its master, cast. Collective: weights that are sharded are gathered for it."""
    masters = whole(engine)
    parameters = parameters_of(engine)
    with engine.gathered(list(parameters.values())) as weights:
        return all(
            torch.equal(weight.detach().flatten(), masters.tensors[MASTER, name].to(weight.dtype))
            for name, weight in zip(parameters, weights, strict=True)
        )


def resident_bytes() -> dict[int, int]:
    """Bytes of every tensor storage that this process holds, by storage."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, Tensor) and value.device.type != "meta"]
    # A DTensor is a wrapper; the memory is its local tensor's.
    storages = [tensor.untyped_storage() for tensor in tensors if not isinstance(tensor, DTensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}
