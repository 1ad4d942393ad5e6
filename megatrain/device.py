"""The one place that knows what a rank computes on: devices, streams, events, pinned memory, backends.

Design choices:
- The rest asks this file and never torch.cuda, so the same code runs on a GPU and on the CPU; a test enforces it.
- torch.accelerator is used where it says the same for every accelerator; a device registered by a test (the fake GPU)
  is then an accelerator like any other.
- On the CPU copies and events are trivial, not emulated: there is nothing to wait for.
"""

from __future__ import annotations

import gc
import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
"""What weights are in, by the name that a configuration's precision has."""


def accelerator() -> str | None:
    """The accelerator's type ("cuda", or one that a test registered), or None on a machine that has only its CPU."""
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return current.type if current else None


def count() -> int:
    """Accelerators of this node; 0 on the CPU. Starts no CUDA context, so the launcher may ask."""
    return torch.accelerator.device_count() if accelerator() else 0


def local_rank() -> int:
    """This process's number on its node, as its launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_of_this_node() -> int:
    """How many processes of the run are on this node, as its launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device() -> torch.device:
    """Where this rank computes."""
    kind = accelerator()
    return torch.device(kind, local_rank()) if kind else CPU


def backend() -> str:
    """The torch.distributed backend for tensors on `device()`. What ranks agree on besides goes over the CPU store."""
    return "nccl" if accelerator() == "cuda" else "gloo"


def start(timeout_seconds: float, deterministic: bool = False) -> torch.device:
    """Takes this rank's device and joins the process group that the launcher's environment describes.

    The device is set before the group is made, which binds NCCL's communicators to it (device_id) and saves the first
    collective from guessing. Allocator settings are read at the first allocation, hence first of all.
    NCCL's own watch over a device that doesn't answer aborts the process: it is given as long as a collective, so that
    the run's watchdog speaks first.
    """
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(timeout_seconds)))
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the old name, which torch still puts first
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        set_deterministic()
    where = device()
    if where != CPU:
        torch.accelerator.set_device_index(where)
    dist.init_process_group(
        backend(),
        timeout=timedelta(seconds=timeout_seconds),
        device_id=where if backend() == "nccl" else None,
    )
    return where


def finish() -> None:
    """Leaves the process group in order: every rank has arrived before any tears its sockets down."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def set_deterministic() -> None:
    """Only algorithms that give the same bits each time; an operation that has none raises when it is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs a pass over it and hides nothing here: no kernel of ours reads what it didn't write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def pin_memory(tensor: Tensor) -> Tensor:
    """`tensor` in page-locked memory, from which a copy to the device needn't block; the same tensor on the CPU."""
    return tensor.pin_memory() if accelerator() else tensor


@dataclass
class PendingCopy:
    """Tensors on their way to the host."""

    tensors: dict[str, Tensor]
    event: torch.Event | None

    def ready(self) -> bool:
        """Whether the copies have landed. Doesn't block."""
        return self.event is None or bool(self.event.query())

    def wait(self) -> dict[str, Tensor]:
        """The tensors on the CPU, once the copies have landed. Until then they hold anything."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensors


def copy_to_host(tensors: dict[str, Tensor]) -> PendingCopy:
    """Starts copying `tensors` to (pinned) host memory behind the work queued so far, without blocking."""
    if device() == CPU:
        # A copy all the same: the source may be overwritten by the next step before the host reads it.
        return PendingCopy({name: tensor.detach().clone() for name, tensor in tensors.items()}, None)
    copies = {}
    for name, tensor in tensors.items():
        host = pin_memory(torch.empty(tensor.shape, dtype=tensor.dtype))
        copies[name] = host.copy_(tensor.detach(), non_blocking=True)
    return PendingCopy(copies, event())


def event(timing: bool = False) -> torch.Event | None:
    """An event behind the work queued so far, which any thread may wait for; None on the CPU, which queues nothing.

    timing: elapsed_time between two of them is the milliseconds that the device took.
    """
    if device() == CPU:
        return None
    event = torch.Event(device(), enable_timing=timing)
    event.record()
    return event


def peak_memory() -> int:
    """Bytes allocated on the device at most since the last call; 0 on the CPU."""
    if accelerator() is None:
        return 0
    peak = int(torch.accelerator.max_memory_allocated())
    torch.accelerator.reset_peak_memory_stats()
    return peak


def architecture() -> str | None:
    """What kernels are compiled for here: "sm_90", of AMD "gfx942"; None without a GPU that Triton compiles for."""
    if accelerator() != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device())
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def name() -> str:
    """The device as its maker calls it, "NVIDIA H100 80GB HBM3"; "CPU" on the CPU."""
    return torch.cuda.get_device_name(device()) if accelerator() == "cuda" else "CPU"


def processors(where: torch.device) -> int:
    """How many programs of a kernel a device runs side by side: a GPU's multiprocessors. On the CPU 4, for tests."""
    return torch.cuda.get_device_properties(where).multi_processor_count if where.type == "cuda" else 4


def warps(threads: int, where: torch.device) -> int:
    """The warps that so many threads are: of 32 threads, on AMD's GPUs for data centers of 64. On the CPU as of 32."""
    return threads // (torch.cuda.get_device_properties(where).warp_size if where.type == "cuda" else 32)


def empty_cache() -> None:
    """Gives unused cached memory back, after large temporary tensors were freed."""
    gc.collect()
    if accelerator() is not None:
        torch.accelerator.empty_cache()
