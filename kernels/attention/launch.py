"""Launches of the attention kernels on real tensors. It needs triton, so op.py imports it when a kernel is to run.

Tensors are as kernel.py has them: q, o, do, dq [B, H, G, Sq, D]; k, v, dk, dv [B, H, Sk, D].
"""

from __future__ import annotations

from functools import cache

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from megatrain.kernels.attention import configs, kernel

ALIGNMENT = 16
"""Bytes that pointers and strides have to be multiples of, for TMA as for 128-bit loads."""


def architecture(target: GPUTarget) -> str:
    """The name of a GPU's architecture, as configs.py has it."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@cache
def _architecture() -> str:
    return architecture(triton.runtime.driver.active.get_current_target())


def tiles(q: Tensor) -> configs.Tiles:
    """The tiles for these queries on this device. Raises ValueError where there are none."""
    if triton.knobs.runtime.interpret:
        return configs.INTERPRETER
    if q.device.type == "cpu":
        raise ValueError("attention: Triton's kernels need a GPU, or TRITON_INTERPRET=1 to be tried on the CPU")
    if triton.__version__ != configs.TRITON:
        raise ValueError(f"attention: the kernels are for triton {configs.TRITON}, this is {triton.__version__}")
    return configs.tiles(_architecture(), q.shape[-1], q.itemsize)


def _constants(q: Tensor, tile: configs.Tile) -> dict[str, int]:
    _, heads, group, _, head_dim = q.shape
    of_tile = {"M": tile.queries, "N": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
    return {"HEADS": heads, "GROUP": group, "D": head_dim, **of_tile}


def forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, o: Tensor, lse: Tensor) -> None:
    """Writes o and lse."""
    chosen = tiles(q)
    tile, tma = chosen.forward, chosen.tma
    batch, heads, group, queries, head_dim = q.shape
    kernel.forward[(-(-queries // tile.queries) * batch * heads * group,)](
        operand(q, tile.queries, tma), operand(k, tile.keys, tma), operand(v, tile.keys, tma),
        operand(o, tile.queries, tma), lse, start, end, queries, head_dim**-0.5,
        **_constants(q, tile),
    )  # fmt: skip


def backward_queries(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor, start: Tensor, end: Tensor,
    dq: Tensor, delta: Tensor,
) -> None:  # fmt: skip
    """Writes dq and delta."""
    chosen = tiles(q)
    tile, tma = chosen.backward_queries, chosen.tma
    batch, heads, group, queries, head_dim = q.shape
    kernel.backward_queries[(-(-queries // tile.queries) * batch * heads * group,)](
        operand(q, tile.queries, tma), operand(k, tile.keys, tma), operand(v, tile.keys, tma),
        operand(o, tile.queries, tma), operand(do, tile.queries, tma), operand(dq, tile.queries, tma),
        lse, dlse, delta, start, end, queries, head_dim**-0.5,
        **_constants(q, tile),
    )  # fmt: skip


def backward_keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, column_start: Tensor, column_end: Tensor,
    dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Writes dk and dv. delta: what backward_queries wrote."""
    chosen = tiles(q)
    tile, tma = chosen.backward_keys, chosen.tma
    batch, heads, keys, head_dim = k.shape
    kernel.backward_keys[(-(-keys // tile.keys) * batch * heads,)](
        operand(q, tile.queries, tma), operand(k, tile.keys, tma), operand(v, tile.keys, tma),
        operand(do, tile.queries, tma), operand(dk, tile.keys, tma), operand(dv, tile.keys, tma),
        lse, delta, column_start, column_end, q.shape[3], keys, head_dim**-0.5,
        **_constants(q, tile),
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """`x` as the kernels can read it, which all that a model has is: a copy where a stride or the place doesn't fit."""
    strides = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    fits = x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
    return x if fits and all(stride * x.itemsize % ALIGNMENT == 0 for stride in strides) else x.contiguous()


def operand(x: Tensor, rows: int, tma: bool) -> TensorDescriptor | tuple[Tensor | int, ...]:
    """An aligned tensor as the kernels take it, in tiles of `rows` rows."""
    if x.dim() == 4:
        x = x.unsqueeze(2)
    unit = ALIGNMENT // x.itemsize
    # The stride of a dimension of size 1 may be anything.
    strides = [stride if size > 1 else unit for size, stride in zip(x.shape[:4], x.stride()[:4], strict=True)]
    if not tma:
        return (x, *strides, x.shape[3])
    block = [1, 1, 1, rows, triton.next_power_of_2(x.shape[4])]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)
