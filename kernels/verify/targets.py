"""The GPUs that kernels are compiled for: what they have, and what their machine code calls what kernels count on.

Kernels ask in words that hold for all ("matrix product"); only this table knows that sm_90 has HGMMA for it, gfx942
v_mfma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MATRIX_PRODUCT = "matrix product"
WIDE_LOAD = "128-bit load"
WIDE_STORE = "128-bit store"
BULK_LOAD = "load by descriptor"
BULK_STORE = "store by descriptor"
SPILL = "access to local memory"


@dataclass(frozen=True)
class Target:
    """A GPU as triton.backends.compiler.GPUTarget has it (backend, architecture, lanes: threads of a warp), and more.

    shared_memory: bytes that a block may have. instructions: by what they do, their names in machine code: what they
    begin with, up to a dot or an underscore.
    """

    backend: str
    architecture: int | str
    lanes: int
    shared_memory: int
    instructions: Mapping[str, tuple[str, ...]]

    def warps(self, threads: int) -> int:
        """The warps that so many threads are."""
        return threads // self.lanes


def _nvidia(architecture: int, shared_memory: int, matrix_product: str) -> Target:
    instructions = {
        MATRIX_PRODUCT: (matrix_product,),
        WIDE_LOAD: ("LDG.E.128",),
        WIDE_STORE: ("STG.E.128",),
        BULK_LOAD: ("UTMALDG",),
        BULK_STORE: ("UTMASTG",),
        SPILL: ("LDL", "STL"),
    }
    return Target("cuda", architecture, 32, shared_memory, instructions)


def _amd(architecture: str, shared_memory: int) -> Target:
    instructions = {
        MATRIX_PRODUCT: ("v_mfma",),
        WIDE_LOAD: ("global_load_dwordx4", "buffer_load_dwordx4"),
        WIDE_STORE: ("global_store_dwordx4", "buffer_store_dwordx4"),
        SPILL: ("scratch_load", "scratch_store"),
    }
    return Target("hip", architecture, 64, shared_memory, instructions)


TARGETS = {
    "sm_80": _nvidia(80, 163 * 1024, "HMMA"),
    "sm_90": _nvidia(90, 227 * 1024, "HGMMA"),
    "sm_100": _nvidia(100, 227 * 1024, "UTCHMMA"),
    "gfx942": _amd("gfx942", 64 * 1024),
}
"""By name. Shared memory: CUDA programming guide, compute capabilities; AMD's "CDNA 3 ISA", local data share."""
