"""The modules that hold parameters: embedding, projections, norms.

Design choices:
- A parameter is used in the forward of the module that owns it, and nowhere else: ZeRO-3 and FSDP gather it by a hook
  on that module.
- Parameters are made with torch.empty: their values always come from a ShardReader (a checkpoint, or the
  counter-based initial weights), so nothing is drawn twice.
- Autograd saves the parameters themselves and no views of them: ZeRO-3 frees a weight between forward and backward, and
  a saved view would keep its memory. So products of [in, out] weights are `x @ W`, and those of [out, in] have a
  function of their own (F.linear saves W^T).
- Norms compute in fp32 whatever the weights are (fp64 stays fp64), and give back the dtype they got.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from megatrain.config import ModelConfig, Norm


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    """x W^T, saving x and W."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: [..., out] from x [..., in] and weight [out, in]."""
    result: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class Embedding(nn.Module):
    """Rows of a matrix [vocab_size, hidden_size] by id."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S, hidden_size] from int32[B, S]."""
        return F.embedding(ids, self.weight)


class ColumnLinear(nn.Module):
    """x W^T + b with W [out, in]: dimension 0, which tensor parallelism shards, is the output."""

    def __init__(self, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class RowLinear(nn.Module):
    """x W + b with W [in, out]: dimension 0, which tensor parallelism shards, is the input."""

    def __init__(self, size_in: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x."""
        return F.rms_norm(at_least_fp32(x), self.weight.shape, at_least_fp32(self.weight), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x."""
        weight, bias = at_least_fp32(self.weight), at_least_fp32(self.bias)
        return F.layer_norm(at_least_fp32(x), self.weight.shape, weight, bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that the configuration names."""
    return (RMSNorm if config.norm == Norm.rms else LayerNorm)(config.hidden_size, config.norm_eps)
