"""What every engine does alike, whoever shards: sums of losses, gradient norm, clipping, the fused optimizer's state.

Design choices:
- Nothing here reads the device, but for saving. The engines give views of gradients; which elements of the whole those
  are, and which other ranks hold them too, model/partition.py says: so each counts once in the norm.
- Sums over billions of elements are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.batch import IGNORE, Batch, Stats
from megatrain.model.partition import Part, cut
from megatrain.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state besides the step count: one vector each, of the ranges of the master (law 1)."""

COMPARED_ELEMENTS = 1 << 24
"""How many weights are compared with their masters at a time, which bounds the memory that it takes."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element: what its bits are compared as."""


NORM = "gradient norm"
"""What every rank computes alike, in the words of Engine.alike."""


@dataclass(frozen=True)
class Gradient:
    """Elements [start, start + len(tensor)) of a rank's own, flattened parameter; scaling it scales the step. 1-D."""

    name: str
    start: int
    tensor: Tensor


class Sums:
    """Loss sums and target counts by source, on the device."""

    def __init__(self, sources: int, where: torch.device) -> None:
        self.sources = torch.arange(sources, device=where)
        self.loss = torch.zeros(sources, dtype=torch.float64, device=where)
        self.targets = torch.zeros(sources, dtype=torch.int64, device=where)

    def add(self, batch: Batch, losses: Tensor) -> None:
        """losses: [B, S], 0 where there is no target."""
        # A comparison instead of index_add_, whose order of summation on a GPU is not fixed; `where` instead of a
        # product, so that a loss that isn't finite stays with its own source.
        of_source = batch.source[:, None] == self.sources
        loss = losses.sum(dim=1, dtype=self.loss.dtype)[:, None]
        self.loss += torch.where(of_source, loss, 0.0).sum(dim=0)
        self.targets += torch.where(of_source, (batch.targets != IGNORE).sum(dim=1)[:, None], 0).sum(dim=0)

    def reduced(self, mesh: Mesh, norm: Tensor | None) -> Stats:
        """The sums over all samples, of which the last stages of pipelines know. Collective."""
        dist.all_reduce(self.loss, group=mesh.losses_group)
        dist.all_reduce(self.targets, group=mesh.losses_group)
        return Stats(loss_sum=self.loss, target_count=self.targets, gradient_norm=norm)


def loss_scale(target_count: Tensor, divided_by: int = 1) -> Tensor:
    """What a sum of token losses is multiplied by (law 3), 0-dim float64.

    divided_by: what the reduction of gradients will divide by, where it averages over ranks.
    """
    # max: a step without targets has no gradient and is skipped, but not by a division by zero.
    return divided_by / target_count.clamp(min=1).double()


@torch.no_grad()
def sum_tied(gradients: Sequence[Gradient], mesh: Mesh, where: torch.device) -> None:
    """Adds up the gradients of an embedding that the first and the last stage of a pipeline share. Collective of both.

    Both hold the same ranges of it, since it is cut by itself. where: the device that communicates, which offloaded
    gradients visit.
    """
    for gradient in gradients:
        if gradient.name == "embedding.weight":
            total = gradient.tensor.to(where)
            dist.all_reduce(total, group=mesh.ends_group)
            gradient.tensor.copy_(total)


@torch.no_grad()
def gradient_norm(
    gradients: Sequence[Gradient], parts: Mapping[str, Part], where: torch.device, copies: int = 1
) -> Tensor:
    """The global 2-norm over all ranks, 0-dim float64 on the device `where`. Collective.

    copies: how many data-parallel ranks have each of these gradients. What ranks hold alike besides, as `parts` says,
    counts at its first copy.
    """
    counted = [
        gradient.tensor[offset - gradient.start : offset - gradient.start + piece.stop - piece.start]
        for gradient in gradients
        for piece, offset in cut(parts[gradient.name].pieces, gradient.start, gradient.start + len(gradient.tensor))
        if piece.replica == 0
    ]
    squares = torch.zeros((), dtype=torch.float64, device=where)
    if counted:
        norms = torch._foreach_norm(counted, 2, dtype=torch.float64)
        squares += torch.stack(norms).square().sum().to(where)
    dist.all_reduce(squares)
    return (squares / copies).sqrt()


def is_whole(part: Part) -> bool:
    """Whether a tensor-parallel rank holds all of a parameter that may be cut."""
    return len(part.pieces) == 1 and part.pieces[0].stop - part.pieces[0].start == math.prod(part.shape)


@torch.no_grad()
def clip(gradients: Sequence[Gradient], norm: Tensor, largest: float) -> None:
    """Scales the gradients in place so that their global norm is at most `largest`; 0: leaves them.

    The coefficient goes where the gradients are: the host, if they were offloaded.
    """
    tensors = [gradient.tensor for gradient in gradients]
    if largest > 0 and tensors:
        # A norm that isn't finite would make every gradient NaN; such a step is skipped anyway.
        coefficient = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(tensors, coefficient.to(tensors[0].device).to(tensors[0].dtype))


def set_step(optimizer: torch.optim.Optimizer, learning_rate: float, skip: Tensor, where: torch.device) -> None:
    """What the fused optimizer's next step reads: the rate, and whether it leaves everything as it is.

    where: the device of the masters. Where that is the host and `skip` isn't, this reads the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.found_inf = skip.to(where).float()  # type: ignore[attr-defined]


def create_state(optimizer: torch.optim.Optimizer, masters: Iterable[Tensor], step: int) -> None:
    """Makes the optimizer's state where there is none yet, moments zero, and sets its step count.

    The count lies on the device beside the moments, as fused AdamW keeps it. State that exists stays where it is.
    """
    for master in masters:
        state = optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state |= {moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS}
        state["step"].fill_(step)


@torch.no_grad()
def differing_weights(held: Iterable[tuple[str, Tensor, Tensor]]) -> str | None:
    """The name of the first whose weights aren't its masters rounded to their dtype, to the bit; None: all are.

    held: (name, weights, masters), 1-D views of the same elements. Offloaded masters visit the weights' device a part
    at a time. A NaN equals any NaN, since rounding may change which it is. Reads the device once.
    """
    names: list[str] = []
    differs: list[Tensor] = []
    for name, weights, masters in held:
        parts = (torch.split(each, COMPARED_ELEMENTS) for each in (weights, masters))
        for weight, master in zip(*parts, strict=True):
            rounded, bits = master.to(weight.device, weight.dtype), INTEGERS[weight.itemsize]
            unequal = (weight.view(bits) != rounded.view(bits)) & ~(weight.isnan() & rounded.isnan())
            names.append(name)
            differs.append(unequal.any())
    if not names:
        return None
    return next((name for name, yes in zip(names, torch.stack(differs).tolist(), strict=True) if yes), None)
