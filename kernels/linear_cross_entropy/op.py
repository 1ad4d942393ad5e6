"""The head's projection and its loss, a chunk of tokens at a time: the logits of all never exist.

Design choices:
- The operation gives the log-sum-exp and the target's logit of each token, with gradients of both. The loss, z-loss,
  targets that are ignored, and the ranks' parts of a vocabulary are then vectors' arithmetic (`losses`, and logsumexp
  over the parts), and any weighting of tokens is right: sums or single losses, never a mean.
- The backward pass computes the logits again: one more product of the head, and no gradient is made before it is known
  what of.
- The weight's gradient is summed over chunks in fp32 and rounded once. cuBLAS gives fp32 products of bf16 matrices;
  the CPU's don't, so there they are converted.
- triton=False is the same chunks in plain torch: where there is no GPU, and for fp64.
- Triton is imported when a kernel is launched, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatrain import device
from megatrain.kernels.arguments import require_dtype, require_shape
from megatrain.kernels.linear_cross_entropy import configs, reference


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, first: int = 0, count: int | None = None, triton: bool = True
) -> tuple[Tensor, Tensor]:
    """Of the logits x weight^T the log-sum-exp over this part of the vocabulary, and the target's; of each token.

    x: [T, H] in fp32 or bf16, without triton also fp64. weight: [V, H] of the same dtype; its first `count` rows (by
    default all) are those of the ids from `first` on. targets: int32 or int64 [T]. Returns two [T] in fp32 (fp64 where
    x is); the latter is 0 where the target isn't among the ids.
    """
    count = weight.shape[0] if count is None else count
    result: tuple[Tensor, Tensor] = linear_cross_entropy_forward(x, weight, targets, first, count, triton)
    return result


def losses(lse: Tensor, of_target: Tensor, targets: Tensor, ignore: int, z_loss: float = 0.0) -> Tensor:
    """-log of each target's probability, and z_loss * lse^2 (Chowdhery et al. 2022, section 5); [T].

    0, and without a gradient, where the target is `ignore`. lse and of_target are those of the whole vocabulary.
    """
    return (lse - of_target + z_loss * lse.square()).masked_fill(targets == ignore, 0.0)


@torch.library.custom_op("megatrain::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor, first: int, count: int, triton: bool
) -> tuple[Tensor, Tensor]:
    """As linear_cross_entropy."""
    if triton:
        require_dtype("linear_cross_entropy", x, weight)
    require_shape("linear_cross_entropy", "targets", targets, x.shape[0])
    lse, of_target = _empty_forward(x, weight, targets, first, count, triton)
    for part in _chunks(x, weight):
        logits = x[part] @ weight.mT
        if triton:
            from megatrain.kernels.linear_cross_entropy import kernel

            kernel.forward[(logits.shape[0],)](
                logits, targets[part], lse[part], of_target[part], logits.shape[1], first, count,
                BLOCK=configs.FORWARD_BLOCK, num_warps=device.warps(configs.THREADS, x.device),
            )  # fmt: skip
        else:
            lse[part], of_target[part] = reference.of_logits(logits, targets[part], first, count)
    return lse, of_target


@linear_cross_entropy_forward.register_fake
def _empty_forward(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    targets: Tensor,  # noqa: ARG001
    first: int,  # noqa: ARG001
    count: int,  # noqa: ARG001
    triton: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


@torch.library.custom_op("megatrain::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    dlse: Tensor, dof_target: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    first: int, count: int, triton: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and, if of_weight, of the weight (else [0, H])."""
    dx, _ = _empty_backward(dlse, dof_target, x, weight, targets, lse, first, count, triton, of_weight)
    dweight = weight.new_zeros(weight.shape if of_weight else (0, weight.shape[1]), dtype=lse.dtype)
    for part in _chunks(x, weight):
        logits = x[part] @ weight.mT
        chunk = targets[part], lse[part], dlse[part].contiguous(), dof_target[part].contiguous()
        if triton:
            from megatrain.kernels.linear_cross_entropy import kernel

            rows, width = logits.shape
            kernel.backward[(rows, -(-width // configs.BACKWARD_BLOCK))](
                logits, *chunk, width, first, count,
                BLOCK=configs.BACKWARD_BLOCK, num_warps=device.warps(configs.THREADS, x.device),
            )  # fmt: skip
            dlogits = logits
        else:
            dlogits = _gradient_of_logits(logits, *chunk, first, count)
        torch.mm(dlogits, weight, out=dx[part])
        if of_weight:
            _add_product(dweight, dlogits.mT, x[part])
    return dx, dweight.to(weight.dtype)


@linear_cross_entropy_backward.register_fake
def _empty_backward(
    dlse: Tensor,  # noqa: ARG001
    dof_target: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    targets: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    first: int,  # noqa: ARG001
    count: int,  # noqa: ARG001
    triton: bool,  # noqa: ARG001
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    rows = weight.shape[0] if of_weight else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(rows, weight.shape[1])


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    rows = configs.rows(weight.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def _gradient_of_logits(
    logits: Tensor, targets: Tensor, lse: Tensor, dlse: Tensor, dof_target: Tensor, first: int, count: int
) -> Tensor:
    """What kernel.backward computes, in plain torch."""
    gradient = (logits.to(lse.dtype) - lse[:, None]).exp_().mul_(dlse[:, None])
    column = targets.long()[:, None] - first
    elsewhere = (column < 0) | (column >= count)
    gradient.scatter_add_(1, column.masked_fill(elsewhere, 0), dof_target[:, None].masked_fill(elsewhere, 0.0))
    gradient[:, count:].zero_()
    return gradient.to(logits.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in total's dtype, fp32 or fp64."""
    if a.dtype == total.dtype or a.device.type == "cpu":
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets, output[0])


def _backward(ctx: Any, dlse: Tensor, dof_target: Tensor) -> tuple[Tensor | None, ...]:
    of_weight = ctx.needs_input_grad[1]
    dx, dweight = linear_cross_entropy_backward(dlse, dof_target, *ctx.saved_tensors, *ctx.options, of_weight)
    return dx, dweight if of_weight else None, None, None, None, None


linear_cross_entropy_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.megatrain.linear_cross_entropy_forward)
def forward_flops(x_shape: tuple[int, int], weight_shape: tuple[int, int], *_: Any, **__: Any) -> int:
    """One product."""
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.megatrain.linear_cross_entropy_backward)
def backward_flops(
    _dlse: Any, _dof_target: Any, x_shape: tuple[int, int], weight_shape: tuple[int, int], *options: Any, **__: Any
) -> int:
    """The logits again, the gradient of x, and that of the weight."""
    of_weight = bool(options[-1])
    return (2 + of_weight) * forward_flops(x_shape, weight_shape)
