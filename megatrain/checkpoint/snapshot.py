"""A copy of what a rank saves, in host memory: training goes on while it is written.

Design choices:
- Only what this rank writes is copied: its part of ranges that other ranks hold too.
- The memory is taken at the first save and used again by each later one: fresh pages cost more than the copy.
- It is taken in blocks of a power of two, which pinned memory is rounded up to, and ranges are cut to fit: a rank's
  state of 10 GB takes 10 GB and not 16.
- Copies are queued behind the work on the device so far, and what comes after them waits for them there: the host
  doesn't wait, and no weight changes before it was copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatrain import device
from megatrain.checkpoint.writer import owned
from megatrain.engines.ranges import Shard

BLOCK_BYTES = 256 * 1024 * 1024
CUT_BYTES = 16 * 1024 * 1024
"""The longest piece of a state: a block's end that no piece fits into is no longer."""


class Snapshot:
    """Holds one copy at a time."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._shards: list[Shard] = []
        self._event: torch.Event | None = None

    def take(self, shards: Iterable[Shard]) -> None:
        """Begins to copy `shards`; nobody may be reading the copy before it."""
        number = used = 0
        self._shards = []
        for shard in _cut(shards):
            tensors = {}
            for state, source in shard.tensors.items():
                size = source.numel() * source.itemsize
                used = -(-used // source.itemsize) * source.itemsize
                if used + size > BLOCK_BYTES:
                    number, used = number + 1, 0
                host = self._block(number)[used : used + size].view(source.dtype)
                tensors[state] = host.copy_(source.detach(), non_blocking=True)
                used += size
            self._shards.append(Shard(shard.name, shard.shape, shard.ranges, tensors))
        self._event = device.event()

    def shards(self) -> list[Shard]:
        """The copy, once it has landed: shards that only this rank holds. Any thread may call it."""
        if self._event is not None:
            self._event.synchronize()
        return self._shards

    def _block(self, number: int) -> Tensor:
        if number == len(self._blocks):
            self._blocks.append(device.pin_memory(torch.empty(BLOCK_BYTES, dtype=torch.uint8)))
        return self._blocks[number]


def _cut(shards: Iterable[Shard]) -> Iterator[Shard]:
    """What this rank writes of `shards`, in ranges that fit a block."""
    for shard in shards:
        longest = CUT_BYTES // max(tensor.itemsize for tensor in shard.tensors.values())
        for first, last, offset in owned(shard):
            for start in range(first, last, longest):
                stop, begin = min(start + longest, last), offset + start - first
                tensors = {state: tensor[begin : begin + stop - start] for state, tensor in shard.tensors.items()}
                yield Shard(shard.name, shard.shape, ((start, stop),), tensors)
