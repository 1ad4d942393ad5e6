"""Rotary positions written out (Su et al. 2021): the mathematics that the kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, group: int, rotated: int) -> Tensor:
    """Turns the pairs (i, i + D/2) of the first `rotated` of every `group` heads of x by their positions' angles.

    x: [B, S, heads * D]. cos, sin: [B, S, 1, D/2]. Computed in fp32, or in fp64 where x is; of x's shape and dtype.
    """
    heads = x.view(*x.shape[:2], -1, group, 2 * cos.shape[-1])
    first, second = heads[..., :rotated, :].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), heads[..., rotated:, :]), dim=-2).flatten(2)
