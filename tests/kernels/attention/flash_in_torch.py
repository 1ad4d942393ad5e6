"""flash-attn's two functions in plain torch, as its documentation says what they compute. Slow, and takes any dtype.

Beside what they compute, this is as strict as the real ones: shapes, int32 boundaries, a last dimension without gaps.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Module(ModuleType):
    """In place of flash_attn (2.8), or of flash_attn.cute (4), which returns the log-sum-exp too. Notes every call."""

    def __init__(self, name: str, returns_lse: bool) -> None:
        super().__init__(name)
        self.returns_lse = returns_lse
        self.calls: list[Call] = []

    def flash_attn_func(self, *arguments: Any, **settings: Any) -> Any:
        self.calls.append(("flash_attn_func", arguments, settings))
        o, lse = flash_attn_func(*arguments, **settings)
        return (o, lse) if self.returns_lse else o

    def flash_attn_varlen_func(self, *arguments: Any, **settings: Any) -> Any:
        self.calls.append(("flash_attn_varlen_func", arguments, settings))
        o, lse = flash_attn_varlen_func(*arguments, **settings)
        return (o, lse) if self.returns_lse else o


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [B, S, heads, D], k and v [B, Sk, kv heads, D]. Returns [B, S, heads, D] and the log-sum-exp [B, heads, S]."""
    assert isinstance(deterministic, bool)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    both = [_one(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)]
    return torch.stack([o for o, _ in both]), torch.stack([lse for _, lse in both])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [total, heads, D], k and v [total, kv heads, D]. Returns [total, heads, D] and log-sum-exps [heads, total]."""
    assert isinstance(deterministic, bool)
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    queries, keys = (_slices(cu, x) for cu, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)))
    assert max(len(q[s]) for s in queries) <= max_seqlen_q
    assert max(len(k[s]) for s in keys) <= max_seqlen_k
    both = [
        _one(q[m], k[n], v[n], softmax_scale, causal, window_size)
        for m, n in zip(queries, keys, strict=True)
        if len(q[m])
    ]
    return torch.cat([o for o, _ in both]), torch.cat([lse for _, lse in both], dim=1)


def _slices(boundaries: Tensor, x: Tensor) -> list[slice]:
    """Of each sequence; those without tokens are legal."""
    assert boundaries.dtype == torch.int32
    assert boundaries.dim() == 1
    assert boundaries.is_contiguous()
    places = boundaries.tolist()
    assert places[0] == 0
    assert places[-1] == len(x)
    assert places == sorted(places)
    return [slice(*both) for both in pairwise(places)]


def _one(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, window_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """One sequence: query i is beside key i + len(k) - len(q), and sees from `left` keys before it to `right` after.

    Query head h uses key-value head h // (heads / kv heads).
    """
    assert q.shape[1] % k.shape[1] == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    left, right = window_size
    right = 0 if causal else right
    distance = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    seen = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    scores = torch.einsum("mhd,nhd->hmn", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v), scores.logsumexp(-1)
