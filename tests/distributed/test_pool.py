"""The pool itself: results by rank, failures with their traceback, hangs that end, and life afterwards."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import Pool, RankFailedError

pytestmark = pytest.mark.distributed


def total(value: int) -> tuple[int, int, int]:
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return dist.get_rank(), dist.get_world_size(), int(tensor)


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("not today")
    dist.barrier()


def hang() -> None:
    time.sleep(60)


def test_ranks_answer_in_order(pool: Pool) -> None:
    assert pool.run(total, ranks=2, value=10) == [(0, 2, 21), (1, 2, 21)]


def test_other_world_sizes_share_the_processes(pool: Pool) -> None:
    assert pool.run(total, ranks=1, value=5) == [(0, 1, 5)]


def test_a_failure_brings_its_traceback_and_the_pool_lives_on(pool: Pool) -> None:
    with pytest.raises(RankFailedError, match=r"rank 1: (.|\n)*ValueError: not today"):
        pool.run(fail_on_rank_1, ranks=2)
    assert pool.run(total, ranks=2, value=0)[0] == (0, 2, 1)


def test_a_hang_ends() -> None:
    pool = Pool()
    begin = time.monotonic()
    with pytest.raises(RankFailedError, match="died"):
        pool.run(hang, ranks=1, timeout=1)
    assert time.monotonic() - begin < 30
    pool.close()
