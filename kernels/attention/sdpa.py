"""Attention by PyTorch, as the model calls it.

Design choices:
- The mask is prepared once a forward and shared by all layers: a Mask holds start and end, and whatever else an
  implementation derives from them (for PyTorch's the dense form, Sq * Sk bytes a sample).
- Keys and values are repeated for their query heads: of PyTorch's fused kernels for GPUs those that take groups
  (enable_gqa) and those that take a mask hardly overlap, and what is left holds all scores.
- The log-sum-exp, which PyTorch's fused attention doesn't give, comes from the reference: right, but it holds the
  scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor

from megatrain.kernels.attention import reference


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees.

    start, end: int32[B, Sq], query m sees key n iff start[m] <= n < end[m]. dense: bool[B, 1, Sq, Sk], the same.
    """

    start: Tensor
    end: Tensor
    dense: Tensor


def prepare(start: Tensor, end: Tensor, keys: int) -> Mask:
    """The mask of int32[B, Sq] start and end over `keys` keys. Costs no host read."""
    return Mask(start, end, reference.visible(start, end, keys)[:, None])


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, return_lse: Literal[False] = False) -> Tensor: ...


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [B, H, Sq, D] over k and v [B, K, Sk, D]; query head h uses key-value head h // (H / K).

    Returns [B, H, Sq, D] in q's dtype; with return_lse also the log-sum-exp of the scaled scores, [B, H, Sq] in fp32
    (fp64 where q is).
    """
    if return_lse:
        return reference.attention(q, k, v, mask.start, mask.end)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense)
