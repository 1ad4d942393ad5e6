"""Tensor parallelism: what the ranks that share each layer's matrices say to each other.

Design choices:
- Plain local tensors and collectives of torch.distributed: DeepSpeed and FSDP2 both take modules made of them.
- Always with sequence parallelism (Korthikanti et al. 2022, section 4.2): the residual stream and its norms hold S/tp
  positions a rank. They are gathered before a column-parallel product and summed and scattered after a row-parallel
  one; activations are never all-reduced.
- Each rank back-propagates the same losses, and what meets at a collective is the part of the gradient that comes from
  its own rows. gather_sequence's backward adds the parts up, so gradients of a rank's own rows and positions are whole.
- What ranks hold alike but use for other positions or heads adds its gradients up by itself: summed_gradient,
  sum_shared_rows.
- Nothing is cast: activations are summed in their own dtype, gradients in the one that they arrive in.
- Alone (size 1) every function is the plain operation, or nothing, without a node in autograd's graph.

B is the number of samples, S the sequence length, tp the number of ranks, N = B x S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain.batch import IGNORE


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among those that share each layer's matrices.

    group: these ranks; None where size is 1. kv_group: those of them that hold the same key-value head; None where no
    two do (as many key-value heads as ranks, or more).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    kv_group: dist.ProcessGroup | None = None


ALONE = TensorParallel()


def gather_sequence(x: Tensor, tensor: TensorParallel) -> Tensor:
    """The positions of all ranks: [B, S, ...] from [B, S/tp, ...]. Its backward sums over the ranks and scatters."""
    if tensor.size == 1:
        return x
    result: Tensor = _GatherSequence.apply(x, tensor)  # type: ignore[no-untyped-call]
    return result


def scatter_sequence(x: Tensor, tensor: TensorParallel) -> Tensor:
    """The sum over the ranks, of this rank's positions: [B, S/tp, ...] from [B, S, ...]. Its backward gathers.

    S is a multiple of tp; a RuntimeError otherwise.
    """
    if tensor.size == 1:
        return x
    result: Tensor = _ScatterSequence.apply(x, tensor)  # type: ignore[no-untyped-call]
    return result


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor = tensor
        parts = x.new_empty(tensor.size * x.shape[0], *x.shape[1:])
        dist.all_gather_single(parts, x.contiguous(), group=tensor.group)
        return torch.unflatten(parts, 0, (tensor.size, -1)).transpose(0, 1).flatten(1, 2)  # A view where B is 1.

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return scatter_sequence(gradient, ctx.tensor), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor = tensor
        parts = torch.unflatten(x, 1, (tensor.size, -1)).transpose(0, 1).flatten(0, 1)  # A view where B is 1.
        total = x.new_empty(x.shape[0], *parts.shape[1:])
        dist.reduce_scatter_single(total, parts.contiguous(), group=tensor.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_sequence(gradient, ctx.tensor), None


def summed_gradient(weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The weight itself; its gradient is the sum over the ranks of `group` (None: it stays as it is).

    For what ranks hold alike and use for other positions or heads: weights of norms, biases of row-parallel products.
    The sum is in the gradient's dtype: a cast to fp32 before this function makes it fp32. What is returned is a view,
    whose memory outlives ZeRO-3's release of the weight where autograd saves it: for small weights only.
    """
    if group is None:
        return weight
    result: Tensor = _SummedGradient.apply(weight, group)  # type: ignore[no-untyped-call]
    return result


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy, for another node may have been given the same tensor.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_shared_rows(gradient: Tensor, first_row: int, group: dist.ProcessGroup | None) -> None:
    """Sums gradient[first_row:] over the ranks of `group`, in place and in its own dtype. None: it is whole.

    For the rows of a key-value head that several ranks hold, of a contiguous gradient of [rows, ...].
    """
    if group is not None:
        dist.all_reduce(gradient[first_row:], group=group)


def vocabulary_range(rows: int, vocab_size: int, tensor: TensorParallel) -> range:
    """The ids whose rows this rank holds, the first len(range) of its `rows`; those after them are padding."""
    first = tensor.rank * rows
    return range(first, max(first, min(first + rows, vocab_size)))


def embedding(ids: Tensor, weight: Tensor, tensor: TensorParallel) -> Tensor:
    """Rows of the vocabulary by id, of this rank's positions: [B, S/tp, hidden] from int32[B, S].

    weight: [rows, hidden], of which rank r holds those of the ids r*rows and after. Only one rank adds what isn't zero,
    so the sum is exact in any dtype.
    """
    if tensor.size == 1:
        return F.embedding(ids, weight)
    # Remainders spread the other ranks' ids over all rows: one row for all of them would be a queue in the backward.
    rows = F.embedding(ids % weight.shape[0], weight)
    elsewhere = ids // weight.shape[0] != tensor.rank
    return scatter_sequence(rows.masked_fill_(elsewhere.unsqueeze(-1), 0.0), tensor)


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, tensor: TensorParallel) -> Tensor:
    """The loss of each target, [N] in fp32 (fp64 where the logits are); the same bits on every rank.

    logits: [N, columns], of which rank r holds those of the ids r*columns and after; columns past vocab_size (padding,
    which a rank alone has none of) count nothing. targets: int32 or int64 [N], below vocab_size or IGNORE, whose loss
    and gradient are 0. The logits are never gathered: the ranks take the maximum of the rows' maxima, then the sum of
    exponentials and of the target's logit, which only one rank has. The backward takes no collective.
    """
    if tensor.size == 1:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.long(), ignore_index=IGNORE, reduction="none")
    ids = vocabulary_range(logits.shape[1], vocab_size, tensor)
    losses: Tensor = _CrossEntropy.apply(logits, targets, ids, tensor.group)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    """Keeps one matrix of the logits' shape, in fp32 or fp64, whose memory becomes the gradient's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ids: range, group: dist.ProcessGroup) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if ids:
            largest = logits[:, : len(ids)].amax(dim=1).to(dtype)
        else:
            largest = logits.new_full(logits.shape[:1], -torch.inf, dtype=dtype)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)

        shifted = logits - largest.unsqueeze(1)  # In dtype.
        column = (targets.long() - ids.start).unsqueeze(1)
        elsewhere = (column < 0) | (column >= len(ids))
        column = column.masked_fill(elsewhere, 0)
        of_target = shifted.gather(1, column).masked_fill_(elsewhere, 0.0).squeeze(1)
        exponentials = shifted.exp_()
        exponentials[:, len(ids) :].zero_()
        sums = torch.stack([exponentials.sum(dim=1), of_target])
        dist.all_reduce(sums, group=group)

        ignored = targets == IGNORE
        ctx.save_for_backward(exponentials, sums[0], column, elsewhere, ignored)
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).masked_fill_(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, total, column, elsewhere, ignored = ctx.saved_tensors
        scale = gradient.masked_fill(ignored, 0.0).unsqueeze(1)
        # In place: a second backward through the same graph fails at saved_tensors.
        of_logits = exponentials.mul_(scale / total.unsqueeze(1))
        of_logits.scatter_add_(1, column, -scale.masked_fill(elsewhere, 0.0))
        return of_logits.to(ctx.dtype), None, None, None


def whole_vocabulary(lse: Tensor, of_target: Tensor, tensor: TensorParallel) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the target's logit over the vocabulary of all ranks, from those over each one's part: [N].

    The same bits on every rank. A part without the target has 0 for its logit, one without ids -inf for its
    log-sum-exp. The backward takes no collective.
    """
    if tensor.size == 1:
        return lse, of_target
    result: tuple[Tensor, Tensor] = _WholeVocabulary.apply(lse, of_target, tensor.group)  # type: ignore[no-untyped-call]
    return result


class _WholeVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lse: Tensor, of_target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        largest = lse.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        share = (lse - largest).exp_()
        sums = torch.stack([share, of_target])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(share.div_(sums[0]))
        return largest + sums[0].log(), sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_lse: Tensor, of_target: Tensor) -> tuple[Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        return of_lse * share, of_target, None
