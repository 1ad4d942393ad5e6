"""The mesh: which rank does what.

Design choices:
- One DeviceMesh with the dimensions (pp, dp, cp, tp), tp innermost so that a tensor-parallel group lies on one node;
  every group is derived from it.
- The mesh of one process is the same object with every dimension 1, so nothing downstream asks whether it is alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain import device
from megatrain.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, arranged."""

    device_mesh: DeviceMesh

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
        return int(self.device_mesh["dp"].size())


def build(parallel: ParallelConfig) -> Mesh:
    """The mesh over all ranks of the process group; what the other dimensions leave is data parallel."""
    taken = parallel.pipeline * parallel.context * parallel.tensor
    shape = (parallel.pipeline, dist.get_world_size() // taken, parallel.context, parallel.tensor)
    kind = device.accelerator() or "cpu"
    return Mesh(init_device_mesh(kind, shape, mesh_dim_names=("pp", "dp", "cp", "tp")))
