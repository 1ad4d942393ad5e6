"""What surviving costs a rank of 512, in CPU time: below 0.5% of a step of a second, at the default intervals."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.resilience import COMPARING, HOOKS, SHARE, WATCHING, shares, table, train_and_count
from tests.distributed.command import write_small_set
from tests.distributed.pool import Pool


def test_surviving_takes_little_of_a_step(pool: Pool, tmp_path: Path) -> None:
    """benchmarks/resilience.py with a smaller model: fewer tensors to compare, the rest is the same."""
    write_small_set(tmp_path / "set")
    model = ("model.num_layers=2",)
    costs = pool.run(train_and_count, 2, timeout=120, folder=tmp_path, stage=3, crowd=512, overrides=model)
    for of_rank in costs:
        assert set(of_rank) == {WATCHING, *HOOKS}
        assert min(of_rank.values()) > 0
        assert sum(shares(of_rank).values()) < SHARE
    assert costs[0][WATCHING] > 1e-3  # It has met the 512.


def test_what_comes_seldom_counts_as_seldom() -> None:
    costs = {WATCHING: 5e-3, COMPARING: 2e-3, "pace": 4e-5}
    assert shares(costs) == pytest.approx({WATCHING: 1e-3, COMPARING: 2e-5, "pace": 4e-5})
    *_, pace, everything = table("a run", [costs, costs | {"pace": 6e-5}, costs])
    assert pace == {
        "run": "a run",
        "part": "pace",
        "each": "step",
        "us, rank 0": 40,
        "us, others": 60,
        "%, rank 0": 0.004,
        "%, others": 0.006,
    }
    assert (everything["us, rank 0"], everything["%, others"]) == (1060, 0.108)
