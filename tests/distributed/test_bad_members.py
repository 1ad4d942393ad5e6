"""`megatrain train` over a set with a bad member that is skipped: every rank meets it, one event names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.data.format import open_set
from megatrain.errors import DONE
from megatrain.observe.records import read
from tests.data.sets import flip_a_bit
from tests.distributed.command import train, write_small_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_a_bad_member_is_one_event(tmp_path: Path) -> None:
    shards = open_set(write_small_set(tmp_path / "set"))
    flip_a_bit(shards, 1, 0)
    skip = ("precision=fp32", "engine.zero_stage=1", "data.bad_member=skip")
    with train(tmp_path / "set", tmp_path / "run", *skip) as command:
        assert command.wait(250).code == DONE
    bad = [event["reason"] for event in read(tmp_path / "run/events.jsonl") if event["event"] == "bad_member"]
    assert bad == [f"{shards.path(1)}: member 000000 was altered since it was written (xxh3-128 differs)"]
