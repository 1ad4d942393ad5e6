"""RMSNorm and LayerNorm with a residual sum, as operations of torch: for autograd, torch.compile and fake tensors.

Design choices:
- One pair of operations for both norms: LayerNorm is the one with a bias.
- Custom operations rather than wrapped Triton ones, which the interpreter can't run.
- Without a residual the sum is x itself, and isn't returned by the operation: an output mustn't alias an input.
- Not counted as FLOPs, as nothing is but matrix products and attention (megatrain/model/spec.py).
- Triton is imported when a kernel is launched, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatrain import device
from megatrain.kernels.arguments import require_dtype, require_shape
from megatrain.kernels.norm import configs


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s / sqrt(mean(s^2) + eps) * weight over the last dimension, and s = x + residual, both of x's shape and dtype.

    x, residual: [..., N] of one dtype, fp32 or bf16. weight: [N] of either. Computed in fp32.
    """
    y, summed, _, _ = norm_forward(x, residual, weight, None, eps)
    return y, x if residual is None else summed


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s - mean(s)) / sqrt(var(s) + eps) * weight + bias, and s = x + residual. As rms_norm."""
    y, summed, _, _ = norm_forward(x, residual, weight, bias, eps)
    return y, x if residual is None else summed


@torch.library.custom_op("megatrain::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, the sum ([0] without a residual), and of each row the mean ([0] without a bias) and 1 / deviation.

    The last two are fp32, of x's shape but its last dimension.
    """
    from megatrain.kernels.norm import kernel

    require_dtype("norm", x, residual, weight, bias)
    require_shape("norm", "residual", residual, *x.shape)
    require_shape("norm", "weight", weight, x.shape[-1])
    require_shape("norm", "bias", bias, x.shape[-1])
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _empty_outputs(x, residual, weight, bias, eps)
    y, summed, mean, rstd = outputs
    rows, width = rstd.numel(), x.shape[-1]
    tile = configs.forward(width)
    tensors = (x, residual, weight, bias, y, summed, mean, rstd)
    warps = device.warps(tile.threads, x.device)
    options = {"HAS_RESIDUAL": residual is not None, "CENTERED": bias is not None, "BLOCK": tile.block}
    if width <= tile.block:
        grid = (-(-rows // tile.rows),)
        kernel.forward[grid](*tensors, rows, width, eps, **options, ROWS=tile.rows, num_warps=warps)
    else:
        kernel.forward_tiled[(rows,)](*tensors, width, eps, **options, num_warps=warps)
    return outputs


@norm_forward.register_fake
def _empty_outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor | None,
    eps: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    nothing = x.shape[:-1] if bias is not None else (0,)
    return (
        y,
        torch.empty_like(y) if residual is not None else x.new_empty(0),
        x.new_empty(nothing, dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


@torch.library.custom_op("megatrain::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and so of the residual), of the weight, and of the bias ([0] where there is none).

    dsummed: the gradient of the sum, or None where that isn't used.
    """
    from megatrain.kernels.norm import kernel

    dy, dsummed = dy.contiguous(), None if dsummed is None else dsummed.contiguous()
    rows, width = rstd.numel(), summed.shape[-1]
    centered = bias is not None
    tile = configs.backward(width)
    warps = device.warps(tile.threads, dy.device)
    whole = width <= tile.block
    norm_part = mean_part = None
    if not whole:
        norm_part, mean_part = torch.empty_like(rstd), torch.empty_like(mean)
        kernel.backward_sums[(rows,)](
            dy, summed, weight, mean, rstd, norm_part, mean_part, width,
            CENTERED=centered, BLOCK=tile.block, num_warps=warps,
        )  # fmt: skip
    share = -(-rows // device.processors(dy.device))
    programs = -(-rows // share)
    dx = torch.empty_like(summed)
    dweight = dy.new_empty(programs, width, dtype=torch.float32)
    dbias = torch.empty_like(dweight) if centered else None
    kernel.backward[(programs, -(-width // tile.block))](
        dy, dsummed, summed, weight, mean, rstd, norm_part, mean_part, dx, dweight, dbias, rows, width, share,
        HAS_DSUMMED=dsummed is not None, CENTERED=centered, WHOLE=whole, ROWS=tile.rows, BLOCK=tile.block,
        num_warps=warps,
    )  # fmt: skip
    if bias is None or dbias is None:
        return dx, dweight.sum(0).to(weight.dtype), weight.new_empty(0)
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


@norm_backward.register_fake
def _empty_gradients(
    dy: Tensor,  # noqa: ARG001
    dsummed: Tensor | None,  # noqa: ARG001
    summed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(summed),
        torch.empty_like(weight),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, summed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x.contiguous() if residual is None else summed, weight, bias, mean, rstd)


def _backward(ctx: Any, dy: Tensor | None, dsummed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    summed, weight, bias, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(summed) if dy is None else dy
    dx, dweight, dbias = norm_backward(dy, dsummed, summed, weight, bias, mean, rstd)
    return dx, dx if ctx.has_residual else None, dweight, None if bias is None else dbias, None


norm_forward.register_autograd(_backward, setup_context=_save)
