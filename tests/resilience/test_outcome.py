"""outcome.json: whole, and the first to say why."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatrain.errors import BUG, DONE, GAVE_UP, STOPPED
from megatrain.resilience.outcome import clear_outcome, read_outcome, write_outcome


def test_it_says_what_was_written(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    assert write_outcome(tmp_path, STOPPED, "SIGTERM at rank 1", 12, rank=0)
    value = json.loads((tmp_path / "outcome.json").read_bytes())
    assert abs(value.pop("time") - time.time()) < 10
    assert value == {"exit_code": 75, "reason": "SIGTERM at rank 1", "step": 12, "rank": 0}
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason, outcome.step, outcome.rank) == (75, "SIGTERM at rank 1", 12, 0)


def test_the_first_failing_rank_wins(tmp_path: Path) -> None:
    def fail(rank: int) -> bool:
        return write_outcome(tmp_path, GAVE_UP, f"rank {rank} failed", 3, rank)

    with ThreadPoolExecutor(8) as ranks:
        wrote = list(ranks.map(fail, range(8)))
    assert wrote.count(True) == 1
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.rank == wrote.index(True)
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


@pytest.mark.parametrize("exit_code", [DONE, STOPPED])
def test_done_and_stopped_are_rank_0s_to_say(tmp_path: Path, exit_code: int) -> None:
    assert not write_outcome(tmp_path, exit_code, "finished", 3, rank=1)
    assert read_outcome(tmp_path) is None
    assert write_outcome(tmp_path, BUG, "a bug", 3, rank=1)


def test_the_next_start_begins_without_one(tmp_path: Path) -> None:
    clear_outcome(tmp_path)
    write_outcome(tmp_path, GAVE_UP, "full", None, rank=None)
    clear_outcome(tmp_path)
    assert read_outcome(tmp_path) is None
    assert write_outcome(tmp_path, DONE, "finished", 10, rank=0)


def test_a_rank_clears_only_what_is_older_than_itself(tmp_path: Path) -> None:
    write_outcome(tmp_path, GAVE_UP, "full", None, rank=1)
    clear_outcome(tmp_path, before=time.time() - 60)
    assert read_outcome(tmp_path) is not None
    clear_outcome(tmp_path, before=time.time() + 60)
    assert read_outcome(tmp_path) is None
