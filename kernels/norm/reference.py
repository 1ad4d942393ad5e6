"""RMSNorm and LayerNorm with a residual sum, written out: the mathematics that the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s / sqrt(mean(s^2) + eps) * weight over the last dimension, s = x + residual (Zhang and Sennrich 2019).

    x, residual: [..., N] of one dtype, in which s is rounded. Computed in fp32, or in fp64 where x is. Returns the norm
    and s, both of x's shape and dtype.
    """
    summed = x if residual is None else x + residual
    value = summed.to(torch.promote_types(x.dtype, torch.float32))
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * weight).to(x.dtype), summed


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s = x + residual (Ba et al. 2016). As rms_norm."""
    summed = x if residual is None else x + residual
    value = summed.to(torch.promote_types(x.dtype, torch.float32))
    value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * weight + bias).to(x.dtype), summed
