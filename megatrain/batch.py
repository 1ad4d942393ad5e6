"""What data, objectives, engines and kernels agree on: Sequences, Batch and Stats.

Design choices:
- Attention masks have one vocabulary: query m sees key n iff start[m] <= n < end[m], both never decreasing in m, and
  start[m] <= m < end[m]. Documents, sliding windows, prefixes and bidirectional attention are all written in it.
- Where documents begin is in `start` already, but as a list of places it has a length that depends on the values: only
  the host can make it without waiting for the device. So it comes with the batch, for who asks for it.
- Ids are int32 in memory whatever they are on disk: NCCL has no uint16 and no uint32.
- Stats hold sums, never means: law 3 (a mean over the targets of the global batch) is one division at the end.

B is the number of samples of a micro-batch, S the sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

IGNORE = -100
"""The target of a position that predicts nothing."""


class TensorFields:
    """A dataclass of tensors that moves as one."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` applied to each tensor; None stays None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{name: v if v is None else function(v) for name, v in values.items()})

    def to(self, device: torch.device) -> Self:
        """The same on `device`. From pinned memory the copies don't block the host."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Sequences(TensorFields):
    """Samples as they are stored, before an objective made inputs and targets of them. All on the CPU.

    ids: int32[B, S+1].
    document: int32[B, S+1], the position in the sample where the document of each id begins (0 for one that began
        before the sample). Never decreases.
    length: int32[B], how many ids are real; what follows is padding. 0: the sample keeps its place, without targets
        (an empty sample that evens out ranks, or one of a skipped member).
    source: int32[B], the index of the data source.
    """

    ids: Tensor
    document: Tensor
    length: Tensor
    source: Tensor


@dataclass(frozen=True)
class Batch(TensorFields):
    """What a model is trained on.

    input_ids: int32[B, S]. targets: int32[B, S], IGNORE where nothing is predicted. positions: int32[B, S].
    start: int32[B, S], the first key each query sees. end: int32[B, S], one past the last, or None: causal (m+1).
    source: int32[B].
    documents: int32[B, C], document_starts(start), or None where nobody asked for it.
        Only causal masks have it.
    """

    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    start: Tensor
    end: Tensor | None
    source: Tensor
    documents: Tensor | None = None


@dataclass(frozen=True)
class Stats(TensorFields):
    """Sums over the global batch, as device tensors equal on every rank.

    loss_sum: float64[sources], the sum of token losses of each source.
    target_count: int64[sources].
    gradient_norm: 0-dim, before clipping; None in evaluation.
    """

    loss_sum: Tensor
    target_count: Tensor
    gradient_norm: Tensor | None

    def loss(self) -> Tensor:
        """The mean loss over the targets of all sources, 0-dim; 0 where there are none. Costs no host read."""
        return self.loss_sum.sum() / self.target_count.sum().clamp(min=1)


def mask_end(start: Tensor, end: Tensor | None) -> Tensor:
    """`end` itself, or the causal one: end[m] = m + 1. int32, of the shape of `start` ([B, S])."""
    if end is not None:
        return end
    return torch.arange(1, start.shape[-1] + 1, dtype=start.dtype, device=start.device).expand_as(start)


def document_starts(start: Tensor) -> Tensor:
    """Where the documents of each sample begin, 0 first, and S for those that a sample has less than another.

    start: int32[B, S] on the CPU, the first place of the document that each place belongs to. Returns int32[B, C]: C is
    the most documents that a sample has, rounded up to a power of two or to S, so that few shapes occur.
    """
    length = start.shape[1]
    place = torch.arange(length, dtype=start.dtype)
    begins = start == place
    most = int(begins.sum(dim=1).max())
    columns = min(1 << (most - 1).bit_length(), length)
    return torch.where(begins, place, length).topk(columns, largest=False, sorted=True).values
