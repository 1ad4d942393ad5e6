"""How many micro-batches a pipeline's schedule can take.

Design choices:
- No torch: what can't be had is refused before any process is spawned.
- The rules are those of torch.distributed.pipelining. Narayanan et al. 2021 describe both schedules.
"""

from __future__ import annotations

from itertools import count

ONE_F_ONE_B = "1f1b"
INTERLEAVED = "interleaved_1f1b"


def nearest_micro_batches(schedule: str, pipeline: int, micro_batches: int) -> int:
    """The legal number of micro-batches of a step nearest to `micro_batches`, which is legal where it equals it.

    pipeline: ranks of a pipeline. 1f1b keeps them all busy, so it takes at least as many micro-batches;
    interleaved_1f1b goes in rounds of about as many, all of one length. Of two equally near, the larger.
    """

    def legal(number: int) -> bool:
        if schedule == INTERLEAVED and pipeline > 1:
            return number >= 1 and number % max(1, number // pipeline) == 0
        return number >= pipeline

    return next(
        number
        for distance in count()
        for number in (micro_batches + distance, micro_batches - distance)
        if legal(number)
    )
