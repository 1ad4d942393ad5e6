"""Which samples of a global batch a data-parallel rank computes, and in which micro-batches. No torch.

Design choices:
- Micro-batches are dealt to ranks in turn, so all ranks have equally many, as collectives need. Slots past the end of
  the global batch are empty samples: law 3 makes them weigh nothing.

G is global_batch_size, m micro_batch_size (both in samples), D the number of data-parallel ranks.
"""

from __future__ import annotations

import numpy as np

from megatrain.data.order import Int64


def micro_batches(global_batch_size: int, micro_batch_size: int, ranks: int) -> int:
    """Micro-batches that each rank computes in a step: G samples in lots of m, dealt to D ranks."""
    lots = -(-global_batch_size // micro_batch_size)
    return -(-lots // ranks)


def idle_share(global_batch_size: int, micro_batch_size: int, ranks: int) -> float:
    """The share of a step's sample slots, over all ranks, that stay empty."""
    slots = ranks * micro_batch_size * micro_batches(global_batch_size, micro_batch_size, ranks)
    return 1 - global_batch_size / slots


def slots(global_batch_size: int, micro_batch_size: int, ranks: int, rank: int) -> Int64:
    """The place in the global batch of each sample of `rank`: int64[micro-batches, m]; >= G: empty.

    Micro-batch j of rank r holds places (j * D + r) * m and the next m - 1.
    """
    lots = np.arange(micro_batches(global_batch_size, micro_batch_size, ranks)) * ranks + rank
    return lots[:, None] * micro_batch_size + np.arange(micro_batch_size)
