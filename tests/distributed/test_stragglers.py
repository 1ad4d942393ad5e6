"""A real run with a rank that computes more slowly: it is named while the run goes on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatrain.observe.records import read
from megatrain.resilience.stragglers import WINDOW
from tests.distributed.command import ROOT, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

RANK_1_IS_SLOW = """
import os, time

if os.environ.get("RANK") == "1":
    from megatrain.model.modules import ColumnLinear

    forward = ColumnLinear.forward

    def slow(self, x):
        time.sleep(0.02)
        return forward(self, x)

    ColumnLinear.forward = slow
"""


@pytest.mark.parametrize("engine", ["engine=fsdp", pytest.param("engine=deepspeed", marks=pytest.mark.long)])
def test_a_slow_rank_is_named(engine: str, small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RANK_1_IS_SLOW)
    run_dir = tmp_path / "run"
    overrides = (engine, "max_steps=1000000", "resilience.heartbeat_seconds=0.5", "launch.max_idle_share=0.5")

    def named() -> list[dict[str, object]]:
        return [dict(each) for each in read(run_dir / "events.jsonl") if each["event"] == "straggler"]

    with train(small_set, run_dir, *overrides, processes=3, PYTHONPATH=f"{tmp_path}:{ROOT}") as command:
        command.wait_for(lambda: len(named()) > 0, "a straggler event", timeout=240)
    (event,) = named()
    assert (event["rank"], event["host"], event["what"]) == (1, socket.gethostname(), "computing")
    factor, z_score, step = (event[name] for name in ("factor", "z_score", "step"))
    assert isinstance(factor, float)
    assert isinstance(z_score, float)
    assert isinstance(step, int)
    assert (factor > 1.3, z_score > 5, step >= 2 * WINDOW) == (True, True, True)
