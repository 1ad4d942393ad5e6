"""Attention written out: the mathematics that every faster form is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(start: Tensor, end: Tensor, keys: int) -> Tensor:
    """Whether query m sees key n, start[m] <= n < end[m]: bool[B, Sq, keys] from int32[B, Sq] each."""
    n = torch.arange(keys, dtype=start.dtype, device=start.device)
    return (start[..., None] <= n) & (n < end[..., None])


def attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v over the keys that each query sees, and the logarithm of the softmax's denominator.

    q [B, H, Sq, D]; k, v [B, K, Sk, D], where query head h uses key-value head h // (H / K); start, end int32[B, Sq].
    Computed in fp32, or in fp64 where q is. Returns the output [B, H, Sq, D] in q's dtype, and the log-sum-exp
    [B, H, Sq] in fp32 or fp64. A query that sees no key isn't legal (see megatrain/batch.py).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.to(dtype) @ keys.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible(start, end, k.shape[2])[:, None], float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ values).to(q.dtype), lse
