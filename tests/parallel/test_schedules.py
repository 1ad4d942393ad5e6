"""Which numbers of micro-batches are legal: those that torch's schedules take, and none that they don't."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

from megatrain.parallel.schedules import INTERLEAVED, ONE_F_ONE_B, nearest_micro_batches


def torch_takes(schedule: str, pipeline: int, micro_batches: int) -> bool:
    """Whether torch makes the schedule, its sends and receives included."""
    count = pipeline * (2 if schedule == INTERLEAVED else 1)
    stages: list[Any] = [
        SimpleNamespace(stage_index=i, num_stages=count, group_size=pipeline, group_rank=0)
        for i in range(0, count, pipeline)
    ]
    try:
        if schedule == INTERLEAVED:
            ScheduleInterleaved1F1B(stages, micro_batches)
        else:
            Schedule1F1B(stages[0], micro_batches)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", [ONE_F_ONE_B, INTERLEAVED])
@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_legal_is_what_torch_takes(schedule: str, pipeline: int) -> None:
    for micro_batches in range(1, 30):
        legal = nearest_micro_batches(schedule, pipeline, micro_batches) == micro_batches
        assert legal == torch_takes(schedule, pipeline, micro_batches), micro_batches


@pytest.mark.parametrize(
    ("schedule", "pipeline", "micro_batches", "nearest"),
    [
        (ONE_F_ONE_B, 1, 1, 1),
        (ONE_F_ONE_B, 4, 1, 4),
        (ONE_F_ONE_B, 4, 5, 5),
        (INTERLEAVED, 1, 3, 3),
        (INTERLEAVED, 4, 3, 3),
        (INTERLEAVED, 4, 10, 10),
        (INTERLEAVED, 4, 9, 10),
        (INTERLEAVED, 4, 11, 12),
        (INTERLEAVED, 2, 5, 6),
        (INTERLEAVED, 8, 17, 18),
    ],
)
def test_the_nearest(schedule: str, pipeline: int, micro_batches: int, nearest: int) -> None:
    assert nearest_micro_batches(schedule, pipeline, micro_batches) == nearest
