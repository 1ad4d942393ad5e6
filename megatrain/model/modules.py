"""The modules that hold parameters: embedding, projections, norms.

Design choices:
- A parameter is used in the forward of the module that owns it, and nowhere else: ZeRO-3 and FSDP gather it by a hook
  on that module.
- Parameters are made with torch.empty: their values always come from a ShardReader (a checkpoint, or the
  counter-based initial weights), so nothing is drawn twice.
- Autograd saves the parameters themselves and no views of them: ZeRO-3 frees a weight between forward and backward, and
  a saved view would keep its memory. So products of [in, out] weights are `x @ W`, and those of [out, in] have a
  function of their own (F.linear saves W^T).
- Under tensor parallelism the residual stream and its norms hold S / tp positions of each sample: column-parallel
  projections gather them, row-parallel ones scatter their sums. What all ranks hold alike but use on other positions
  or heads (norms, biases after a sum) has its gradient summed over them; so is that of a key-value head that several
  ranks need.
- Norms compute in fp32 whatever the weights are (fp64 stays fp64), and give back the dtype they got.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.config import Kernel, ModelConfig, Norm
from megatrain.kernels.norm import op as norm
from megatrain.parallel.tensor import (
    ALONE,
    TensorParallel,
    embedding,
    gather_sequence,
    scatter_sequence,
    sum_shared_rows,
    summed_gradient,
)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    """x W^T, saving x and W. Rows of W from `shared_from` on are those of every rank of `group`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shared_from: int | None, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.shared_from, ctx.group = shared_from, group
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        if of_weight is not None and ctx.group is not None:
            sum_shared_rows(of_weight, ctx.shared_from, ctx.group)
        return of_x, of_weight, None, None


def linear(x: Tensor, weight: Tensor, shared_from: int | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """x W^T: [..., out] from x [..., in] and weight [out, in].

    group: ranks that hold the rows from `shared_from` on too, whose gradients are summed; None: there are none.
    """
    result: Tensor = _Linear.apply(x, weight, shared_from, group)  # type: ignore[no-untyped-call]
    return result


class Embedding(nn.Module):
    """Rows of a matrix [vocabulary, hidden_size] by id; `rows` of them are this rank's."""

    def __init__(self, rows: int, hidden_size: int, tensor: TensorParallel = ALONE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.tensor = tensor

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S / tp, hidden_size] from int32[B, S]."""
        return embedding(ids, self.weight, self.tensor)


class ColumnLinear(nn.Module):
    """x W^T + b with W [out, in]: dimension 0, which tensor parallelism shards, is the output; `size_out` is local.

    shared_from: the row from which on the ranks of tensor.kv_group hold the same.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        bias: bool,
        tensor: TensorParallel = ALONE,
        shared_from: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None
        self.tensor = tensor
        self.shared_from = shared_from
        self.shared_group = None if shared_from is None else tensor.kv_group

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, out] from [B, S / tp, in]."""
        y = linear(gather_sequence(x, self.tensor), self.weight, self.shared_from, self.shared_group)
        if self.bias is None:
            return y
        if self.shared_group is None:
            return y + self.bias
        own, shared = self.bias[: self.shared_from], self.bias[self.shared_from :]
        return y + torch.cat((own, summed_gradient(shared, self.shared_group)))


class RowLinear(nn.Module):
    """x W + b with W [in, out]: dimension 0, which tensor parallelism shards, is the input; `size_in` is local.

    product: x W; or what multiplies a function of x.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        bias: bool,
        tensor: TensorParallel = ALONE,
        product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None
        self.tensor = tensor
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        """[B, S / tp, out] from [B, S, in]."""
        y = scatter_sequence(self.product(x, self.weight), self.tensor)
        return y if self.bias is None else y + summed_gradient(self.bias, self.tensor.group)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, tensor: TensorParallel = ALONE, kernel: Kernel = Kernel.torch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.tensor = tensor
        self.kernel = kernel

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The same shape and dtype as x; with a residual the norm of the sum of both, and the sum."""
        weight = summed_gradient(at_least_fp32(self.weight), self.tensor.group)
        if self.kernel is Kernel.triton:
            y, summed = norm.rms_norm(x, residual, weight, self.eps)
        else:
            summed = x if residual is None else x + residual
            y = F.rms_norm(at_least_fp32(summed), self.weight.shape, weight, self.eps).to(x.dtype)
        return y if residual is None else (y, summed)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, tensor: TensorParallel = ALONE, kernel: Kernel = Kernel.torch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.tensor = tensor
        self.kernel = kernel

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The same shape and dtype as x; with a residual the norm of the sum of both, and the sum."""
        weight, bias = (summed_gradient(at_least_fp32(p), self.tensor.group) for p in (self.weight, self.bias))
        if self.kernel is Kernel.triton:
            y, summed = norm.layer_norm(x, residual, weight, bias, self.eps)
        else:
            summed = x if residual is None else x + residual
            y = F.layer_norm(at_least_fp32(summed), self.weight.shape, weight, bias, self.eps).to(x.dtype)
        return y if residual is None else (y, summed)


def make_norm(config: ModelConfig, tensor: TensorParallel, kernel: Kernel) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that the configuration names."""
    return (RMSNorm if config.norm == Norm.rms else LayerNorm)(config.hidden_size, config.norm_eps, tensor, kernel)
