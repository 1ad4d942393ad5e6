"""Attention by the Triton kernels, as operators of torch: for autograd, torch.compile and fake tensors.

Design choices:
- Queries come as [B, H, G, Sq, D]: so those of a packed QKV projection [B, S, H, G + 2, D] are a view, as its keys and
  values are. What comes out is laid out [B, Sq, H, G, D], which the output projection takes as it is.
- The log-sum-exp is an output with a gradient: attention over parts of the keys (context parallelism) can be merged.
- Custom operators rather than wrapped Triton ones, which the interpreter can't run.
- FLOPs are counted as PyTorch counts its own attention's: every query with every key, whatever the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatrain.kernels.arguments import require_dtype, require_shape

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Intervals:
    """Which keys each query sees, and by which queries each key is seen.

    start, end: int32[B, Sq], query m sees key n iff start[m] <= n < end[m]; neither decreases in m. A query that sees
        nothing (of a part of the keys) has start[m] == end[m].
    column_start, column_end: int32[B, Sk], the same: iff column_start[n] <= m < column_end[n].
    All contiguous.
    """

    start: Tensor
    end: Tensor
    column_start: Tensor
    column_end: Tensor


def intervals(start: Tensor, end: Tensor, keys: int) -> Intervals:
    """From int32[B, Sq] start and end over `keys` keys. Costs no host read.

    column_start[n] is the first m with end[m] > n, column_end[n] one past the last m with start[m] <= n.
    """
    start, end = start.contiguous(), end.contiguous()
    n = torch.arange(keys, dtype=start.dtype, device=start.device).expand(start.shape[0], keys).contiguous()
    return Intervals(
        start,
        end,
        torch.searchsorted(end, n, right=True, out_int32=True),
        torch.searchsorted(start, n, right=True, out_int32=True),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Intervals) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, G, Sq, D] over k and v [B, H, Sk, D]: G query heads to a key-value head.

    q, k, v: bf16 or fp32, all the same; any strides, though what isn't aligned to 16 bytes is copied. D: a multiple of
    8 up to 256. Returns the output [B, H, G, Sq, D] in q's dtype, and the log-sum-exp of the scaled scores
    fp32[B, H, G, Sq]; both have gradients. A query that sees no key gets 0 and -inf. Raises TypeError for other dtypes,
    ValueError for other shapes and where there is no kernel for the device.
    """
    _check(q, k, v, seen)
    output: tuple[Tensor, Tensor] = attention_forward(q, k, v, seen.start, seen.end, seen.column_start, seen.column_end)
    return output


def _check(q: Tensor, k: Tensor, v: Tensor, seen: Intervals) -> None:
    require_dtype("attention", q, k, v)
    if {k.dtype, v.dtype} != {q.dtype}:
        raise TypeError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; legal: one dtype for all")
    if q.dim() != 5 or k.dim() != 4:
        raise ValueError(
            f"attention: q is {list(q.shape)}, k {list(k.shape)}; legal: [B, H, G, Sq, D] and [B, H, Sk, D]"
        )
    batch, heads, _, queries, head_dim = q.shape
    keys = k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        require_shape("attention", name, tensor, batch, heads, keys, head_dim)
    for name, tensor in (("start", seen.start), ("end", seen.end)):
        require_shape("attention", name, tensor, batch, queries)
    for name, tensor in (("column_start", seen.column_start), ("column_end", seen.column_end)):
        require_shape("attention", name, tensor, batch, keys)
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head dimension {head_dim}; legal: multiples of 8 up to {MAX_HEAD_DIM}")


def _rows_first(x: Tensor) -> Tensor:
    """Memory for a tensor of x's shape [B, ..., S, D], laid out [B, S, ..., D]."""
    return torch.empty_like(x.movedim(-2, 1), memory_format=torch.contiguous_format).movedim(1, -2)


@torch.library.custom_op("megatrain::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    column_start: Tensor,
    column_end: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp; see attention()."""
    from megatrain.kernels.attention import launch

    o, lse = _empty_outputs(q, k, v, start, end, column_start, column_end)
    launch.forward(launch.aligned(q), launch.aligned(k), launch.aligned(v), start, end, o, lse)
    return o, lse


@attention_forward.register_fake
def _empty_outputs(q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return _rows_first(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megatrain::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    column_start: Tensor,
    column_end: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from those of the output and of the log-sum-exp."""
    from megatrain.kernels.attention import launch

    dq, dk, dv = _empty_gradients(do, dlse, q, k, v)
    q, k, v, o, do = (launch.aligned(x) for x in (q, k, v, o, do))
    delta = torch.empty_like(lse)
    launch.backward_queries(q, k, v, o, do, lse, dlse.contiguous(), start, end, dq, delta)
    launch.backward_keys(q, k, v, do, lse, delta, column_start, column_end, dk, dv)
    return dq, dk, dv


@attention_backward.register_fake
def _empty_gradients(
    do: Tensor,  # noqa: ARG001
    dlse: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *_: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_first(q), _rows_first(k), _rows_first(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *seen = inputs
    ctx.save_for_backward(q, k, v, *output, *seen)


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return (*attention_backward(do, dlse, *ctx.saved_tensors), None, None, None, None)


attention_forward.register_autograd(_backward, setup_context=_save)


def _flops_of_a_product(q_shape: torch.Size, k_shape: torch.Size) -> int:
    batch, heads, group, queries, head_dim = q_shape
    return 2 * batch * heads * group * queries * k_shape[-2] * head_dim


@register_flop_formula(torch.ops.megatrain.attention_forward)
def _forward_flops(q_shape: torch.Size, k_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _flops_of_a_product(q_shape, k_shape)


@register_flop_formula(torch.ops.megatrain.attention_backward)
def _backward_flops(do: Any, dlse: Any, q_shape: torch.Size, k_shape: torch.Size, *_: Any, **__: Any) -> int:  # noqa: ARG001
    return 7 * _flops_of_a_product(q_shape, k_shape)
