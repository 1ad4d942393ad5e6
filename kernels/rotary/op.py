"""Rotary positions in place, as an operation of torch: for autograd, torch.compile and fake tensors.

Design choices:
- x is what the projection returned, not a view of it: autograd copies the whole of a tensor whose view is changed.
- A custom operation that changes its input can't say its gradient, so an autograd Function is around it. What was
  there before isn't needed for the gradient.
- Triton is imported when a kernel is launched, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatrain import device
from megatrain.kernels.arguments import require_dtype, require_shape
from megatrain.kernels.rotary import configs


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, group: int = 1, rotated: int = 1) -> Tensor:
    """Turns the pairs (i, i + D/2) of the first `rotated` of every `group` heads of x in place, and returns x.

    x: [B, S, heads * D], contiguous, in fp32 or bf16. cos, sin: fp32[B, S, 1, D/2]. Computed in fp32. A fused
    projection of G queries, a key and a value a group has group = G + 2, rotated = G + 1.
    """
    result: Tensor = _Rotate.apply(x, cos, sin, group, rotated)  # type: ignore[no-untyped-call]
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int) -> Tensor:
        rotary_forward(x, cos, sin, group, rotated)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, cos, sin, ctx.group, ctx.rotated = inputs
        assert output is x
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return rotary_backward(dy, *ctx.saved_tensors, ctx.group, ctx.rotated), None, None, None, None


@torch.library.custom_op("megatrain::rotary_forward", mutates_args=("x",))
def rotary_forward(x: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int) -> None:
    """As rotate_, without a gradient."""
    require_dtype("rotary", x)
    half = cos.shape[-1]
    heads = max(1, x.shape[-1] // (2 * half * group)) * group
    require_shape("rotary", "x", x, *cos.shape[:2], heads * 2 * half)
    require_shape("rotary", "sin", sin, *cos.shape)
    if not x.is_contiguous():
        raise ValueError("rotate_ needs a contiguous tensor: what it changes would be a copy")
    _launch(x, x, cos, sin, group, rotated, backward=False)


@rotary_forward.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int) -> None:
    pass


@torch.library.custom_op("megatrain::rotary_backward", mutates_args=())
def rotary_backward(dy: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int) -> Tensor:
    """dy turned back, [B, S, heads * D]."""
    result: Tensor = _empty(dy, cos, sin, group, rotated)
    _launch(dy.contiguous(), result, cos, sin, group, rotated, backward=True)
    return result


@rotary_backward.register_fake
def _empty(dy: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _launch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int, backward: bool) -> None:
    from megatrain.kernels.rotary import kernel

    half = cos.shape[-1]
    tokens = cos.numel() // half
    heads = x.numel() // (tokens * 2 * half)
    per_program, block = configs.tile(half)
    kernel.rotate[(tokens, -(-heads // per_program))](
        x, y, cos.contiguous(), sin.contiguous(), heads,
        GROUP=group, ROTATED=rotated, HALF=half, BACKWARD=backward, HEADS=per_program, BLOCK=block,
        num_warps=device.warps(configs.THREADS, x.device),
    )  # fmt: skip
