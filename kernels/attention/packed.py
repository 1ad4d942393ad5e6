"""Attention over what a fused projection gives, as the model calls it, by whichever kernel was chosen.

Design choices:
- The mask is prepared once a forward and shared by all layers. Its type says who computes: each kernel derives
  something else from start and end.
- Queries, keys and values come and go as the projections lay them out, [B, S, heads, ...]; each kernel gets the view
  that it takes.
"""

from __future__ import annotations

from torch import Tensor

from megatrain.kernels.attention import flash, op, sdpa

Mask = sdpa.Mask | op.Intervals | flash.Mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q [B, S, H, G, D] over k and v [B, S, H, D], G query heads to each key-value head.

    Returns [B, S, H, G, D] in q's dtype.
    """
    if isinstance(mask, flash.Mask):
        return flash.attention(q, k, v, mask)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, op.Intervals):
        output, _ = op.attention(q.permute(0, 2, 3, 1, 4), keys, values, mask)
        return output.permute(0, 3, 1, 2, 4)
    output = sdpa.attention(q.flatten(2, 3).transpose(1, 2), keys, values, mask)
    return output.transpose(1, 2).view(q.shape)
