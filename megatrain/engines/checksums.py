"""Whether ranks that hold the same bits still do: a silent corruption of data shows nowhere else.

Design choices:
- A checksum of a tensor is the sum of its bits, taken as integers of 64 bits, mod 2^64: one pass of a reduction on the
  device, and any single flipped bit changes it. (Summing integers as wide as an element takes a CPU 30 times as long.)
- Nothing waits: checksums are copied behind the step's work and told to the others when they have landed.
- An engine says what it holds that others hold too (Engine.alike). What only one rank has, the masters of ZeRO and FSDP
  shards, nothing can be compared with; a wrong one shows in checkpoints' hashes only if it changes on the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
import xxhash
from torch import Tensor
from torch.nn import functional

from megatrain import device
from megatrain.resilience.corruption import Comparison

Alike = Iterable[tuple[str, Sequence[Tensor]]]
"""What is held, in words that are the same on the ranks that hold the same, and the tensors in one order on all."""


class CorruptionCheck:
    """Compares every `every` steps. alike: an engine's."""

    def __init__(self, alike: Callable[[], Alike], comparison: Comparison, every: int) -> None:
        self.alike = alike
        self.comparison = comparison
        self.every = every
        self._landing: deque[tuple[int, device.PendingCopy]] = deque()

    def after_step(self, step: int) -> str | None:
        """Called by every rank between steps. On rank 0: who holds other bits than the others, if anyone does."""
        if step % self.every == 0:
            self._landing.append((step, device.copy_to_host(dict(checksums(self.alike())))))
        while self._landing and self._landing[0][1].ready():
            of_step, copies = self._landing.popleft()
            hashes = {what: xxhash.xxh3_64_hexdigest(sums.numpy().tobytes()) for what, sums in copies.wait().items()}
            self.comparison.tell(of_step, hashes)
        return self.comparison.verdict() if self.comparison.rank == 0 else None


@torch.no_grad()
def checksums(alike: Alike) -> Iterable[tuple[str, Tensor]]:
    """int64[tensors] for each thing that is held."""
    for what, tensors in alike:
        if tensors:
            yield what, torch.stack([_checksum(tensor.detach()) for tensor in tensors])


def _checksum(tensor: Tensor) -> Tensor:
    flat, elements = tensor.reshape(-1), 8 // tensor.itemsize
    if flat.numel() % elements or flat.storage_offset() % elements:  # A copy, which begins at a whole word.
        flat = functional.pad(flat, (0, -flat.numel() % elements))
    return flat.view(torch.int64).sum()
