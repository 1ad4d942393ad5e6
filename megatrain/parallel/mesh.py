"""The mesh: which rank does what.

Design choices:
- One DeviceMesh with the dimensions (pp, dp, cp, tp), tp innermost so that a tensor-parallel group lies on one node;
  every group is derived from it, once, when the mesh is built: all ranks then make their groups in the same order.
- The mesh of one process is the same object with every dimension 1, so nothing downstream asks whether it is alone.
- Ranks that differ in tp or pp only get the same samples; a data index is their common number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain import device
from megatrain.config import ParallelConfig
from megatrain.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, arranged.

    tensor: this rank's place among those that share each layer's matrices.
    data: the ranks that see other samples and hold the same part of the model: over all of which weights are sharded;
        or (replicate, shard), where they are sharded within `shard` and alike across `replicate`.
    model_group: the ranks of one data index: together they hold the whole model.
    losses_group: the ranks of one tensor-parallel index: other samples, or other stages of the same.
    ends_group: the first and the last rank of a pipeline, which share a tied embedding; None on the others.
    """

    device_mesh: DeviceMesh
    data: DeviceMesh
    tensor: TensorParallel
    model_group: dist.ProcessGroup
    losses_group: dist.ProcessGroup
    ends_group: dist.ProcessGroup | None

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that see other samples and hold the same parameters."""
        return self.device_mesh.get_group("dp")

    @property
    def data_rank(self) -> int:
        """This rank's number among them."""
        return self.device_mesh.get_local_rank("dp")

    @property
    def data_size(self) -> int:
        """How many they are."""
        return self.data_group.size()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The ranks that hold other layers."""
        return self.device_mesh.get_group("pp")

    @property
    def pipeline_rank(self) -> int:
        """This rank's number among them."""
        return self.device_mesh.get_local_rank("pp")

    @property
    def pipeline_size(self) -> int:
        """How many they are."""
        return self.pipeline_group.size()


def build(parallel: ParallelConfig, num_kv_heads: int) -> Mesh:
    """The mesh over all ranks of the process group; what the other dimensions leave is data parallel. Collective."""
    taken = parallel.pipeline * parallel.context * parallel.tensor
    shape = (parallel.pipeline, dist.get_world_size() // taken, parallel.context, parallel.tensor)
    kind = device.accelerator() or "cpu"
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
    return Mesh(
        device_mesh=mesh,
        data=_data(mesh["dp"], parallel.replicate),
        tensor=_tensor_parallel(mesh, num_kv_heads),
        model_group=mesh["pp", "cp", "tp"]._flatten("model").get_group(),
        losses_group=mesh["pp", "dp", "cp"]._flatten("losses").get_group(),
        ends_group=_ends_group(mesh),
    )


def _data(dp: DeviceMesh, replicate: int) -> DeviceMesh:
    if replicate == 1:
        return dp
    return dp._unflatten(0, (replicate, dp.size() // replicate), ("replicate", "shard"))


def _tensor_parallel(mesh: DeviceMesh, num_kv_heads: int) -> TensorParallel:
    tp = mesh["tp"]
    if tp.size() == 1:
        return TensorParallel()
    kv_group = None
    if tp.size() > num_kv_heads:
        heads = tp._unflatten(0, (num_kv_heads, tp.size() // num_kv_heads), ("kv_head", "same_kv_head"))
        kv_group = heads.get_group("same_kv_head")
    return TensorParallel(tp.get_local_rank(), tp.size(), tp.get_group(), kv_group)


def _ends_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    stages = mesh.size(0)
    if stages == 1:
        return None
    pairs = mesh.mesh[[0, -1]].flatten(1).T.tolist()
    group, _ = dist.new_subgroups_by_enumeration(pairs, group_desc="mesh_ends")  # type: ignore[no-untyped-call]
    return group if mesh.get_local_rank("pp") in (0, stages - 1) else None
