"""The head's projection and what a loss needs of it, written out: what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, first: int = 0, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of the logits x weight^T the log-sum-exp over a vocabulary, and the target's.

    x: [T, H]. weight: [V, H], of which the first `count` rows (by default all) are those of the ids from `first` on.
    targets: int[T]. The logits are rounded to x's dtype, as a model's are; the rest is in fp32, or fp64 where x is.
    Returns two [T] of that; the latter is 0 where the target isn't among the ids.
    """
    return of_logits(x @ weight.mT, targets, first, weight.shape[0] if count is None else count)


def of_logits(logits: Tensor, targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """The same of logits [T, V]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = targets.long()[:, None] - first
    elsewhere = (column < 0) | (column >= count)
    of_target = logits.gather(1, column.masked_fill(elsewhere, 0)).masked_fill(elsewhere, 0.0)
    return logits[:, :count].logsumexp(dim=1), of_target[:, 0]
