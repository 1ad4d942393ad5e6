"""SwiGLU as an operation of torch: for autograd, torch.compile and fake tensors.

Design choices:
- The model's is swiglu_linear, which keeps what it was given and not the product between: the backward pass's kernel
  reads all that it takes to have it again, and writes it for the weight's gradient. Of Llama's layers that is a sixth
  of what is kept.
- Triton is imported when a kernel is launched, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatrain import device
from megatrain.kernels.arguments import require_dtype
from megatrain.kernels.swiglu import configs


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., N] from [..., 2 N] in fp32 or bf16, whose first half is the gate. fp32 inside."""
    result: Tensor = swiglu_forward(gate_up)
    return result


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """swiglu(gate_up) weight, [..., H] from [..., 2 N] and [N, H] of one dtype."""
    result: Tensor = _SwigluLinear.apply(gate_up, weight)  # type: ignore[no-untyped-call]
    return result


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(gate_up: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = swiglu_forward(gate_up)
        return y @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        # The weight itself and no view of it, which would keep its memory where ZeRO-3 frees it.
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weight = ctx.saved_tensors
        dgate_up, y = swiglu_backward(dz @ weight.mT, gate_up)
        dweight = y.flatten(0, -2).mT @ dz.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dgate_up, dweight


@torch.library.custom_op("megatrain::swiglu_forward", mutates_args=())
def swiglu_forward(gate_up: Tensor) -> Tensor:
    """As swiglu."""
    from megatrain.kernels.swiglu import kernel

    require_dtype("swiglu", gate_up)
    y: Tensor = _empty_forward(gate_up)
    warps = device.warps(configs.THREADS, y.device)
    kernel.forward[_grid(y)](gate_up.contiguous(), y, y.shape[-1], BLOCK=configs.BLOCK, num_warps=warps)
    return y


@swiglu_forward.register_fake
def _empty_forward(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megatrain::swiglu_backward", mutates_args=())
def swiglu_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and swiglu(gate_up), the same bits again."""
    from megatrain.kernels.swiglu import kernel

    result: tuple[Tensor, Tensor] = _empty_backward(dy, gate_up)
    warps = device.warps(configs.THREADS, dy.device)
    kernel.backward[_grid(dy)](
        dy.contiguous(), gate_up.contiguous(), *result, dy.shape[-1], BLOCK=configs.BLOCK, num_warps=warps
    )
    return result


@swiglu_backward.register_fake
def _empty_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(gate_up, memory_format=torch.contiguous_format),
        torch.empty_like(dy, memory_format=torch.contiguous_format),
    )


def _grid(y: Tensor) -> tuple[int, int]:
    """A program for each row of y and block of its columns."""
    return y.numel() // y.shape[-1], -(-y.shape[-1] // configs.BLOCK)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    dgate_up: Tensor = swiglu_backward(dy, *ctx.saved_tensors)[0]
    return dgate_up


swiglu_forward.register_autograd(_backward, setup_context=_save)
