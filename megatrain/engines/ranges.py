"""Law 1: a parameter is a flat vector, a shard is a few contiguous ranges of it.

Design choices:
- A Shard is how an engine shows what this rank holds: live views, no copy, no collective. Checkpoints, initial weights
  and export all speak in it, so none of them knows an engine.
- State that isn't there yet comes from a ShardReader: a checkpoint, or the counter-based initial weights. A fresh
  start and a resume are therefore the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatrain.model.partition import Part, cut

MASTER = "master"
"""The state that is the parameter itself, in the precision that the optimizer keeps."""


@dataclass(frozen=True)
class Shard:
    """The ranges of one parameter that this rank holds, with their training state.

    name: global, the same in every layout.
    shape: of the whole parameter as it is stored.
    ranges: (start, stop) in the flattened parameter, ascending, not touching each other.
    tensors: state name (MASTER, exp_avg, exp_avg_sq) to a 1-D live view; the ranges one after the other.
    replica, replicas: this is copy `replica` of `replicas` that hold the same ranges on other ranks.
    """

    name: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    tensors: dict[str, Tensor]
    replica: int = 0
    replicas: int = 1


def shards_of(
    name: str, part: Part, start: int, tensors: Mapping[str, Tensor], copy: int = 0, copies: int = 1
) -> Iterator[Shard]:
    """The shards that a view of a rank's own, flattened parameter is; what it holds of padding is left out.

    part: what of the whole parameter the rank holds. tensors: views of its elements from `start` on, by state.
    copy, copies: this data-parallel copy, of those that hold the same. The ranks may hold pieces alike besides.
    """
    (size,) = {len(tensor) for tensor in tensors.values()}
    for piece, offset in cut(part.pieces, start, start + size):
        first, last = offset - start, offset - start + piece.stop - piece.start
        yield Shard(
            name,
            part.shape,
            ((piece.start, piece.stop),),
            {state: tensor[first:last] for state, tensor in tensors.items()},
            piece.replica * copies + copy,
            piece.replicas * copies,
        )


class ShardReader(Protocol):
    """Where the state of a parameter's ranges comes from."""

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer has taken."""
        ...

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`: 1-D, on the CPU, in the dtype it was stored in."""
        ...


@dataclass(frozen=True)
class WeightsOnly:
    """The masters of another reader, with an optimizer that hasn't taken a step."""

    weights: ShardReader
    optimizer_step: int = 0

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """See ShardReader. Moments are 0."""
        return self.weights.read(state, name, start, stop) if state == MASTER else torch.zeros(stop - start)


def load(shard: Shard, reader: ShardReader) -> None:
    """Fills the views of `shard` in place from `reader`."""
    for state, tensor in shard.tensors.items():
        offset = 0
        for start, stop in shard.ranges:
            tensor[offset : offset + stop - start].copy_(reader.read(state, shard.name, start, stop))
            offset += stop - start
