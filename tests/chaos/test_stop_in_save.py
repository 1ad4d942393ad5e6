"""SIGTERM while the real command saves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import scan
from megatrain.errors import STOPPED
from megatrain.resilience.outcome import read_outcome
from tests.chaos.runs import Reference, injected, start

pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_waits_for_the_save(rank: int, reference: Reference, tmp_path: Path) -> None:
    run_dir, pause = tmp_path / "run", tmp_path / "pause"
    point = f"before fsync step/rank_{rank:05d}.bin"
    environment = injected(run_dir, rank=rank, point=point, action="pause", pause=str(pause))
    with start(reference.data, run_dir, environment=environment) as command:
        command.wait_for(pause.exists, "a save")
        command.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert command.process.poll() is None
        pause.unlink()
        finished = command.wait()
        assert (finished.code, finished.stderr) == (STOPPED, "")
        assert command.left_over() == []
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert [found.problem for found in scan(run_dir)] in ([None], [None, None])
    assert outcome.step == reference.check(run_dir)
    reference.finish(run_dir)
