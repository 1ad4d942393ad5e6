"""The piece of computing is timed once a step, whatever else runs; the sink tells steps and writes who was named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatrain import device
from megatrain.observe.events import EventLog
from megatrain.observe.pace import ComputeTimer, PaceSink
from megatrain.observe.records import read
from megatrain.resilience.progress import Progress
from megatrain.resilience.stragglers import WINDOW, Pace, Stragglers

SECONDS = 0.002


class Slow(nn.Module):
    """Takes SECONDS."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(SECONDS)
        return x


def test_the_module_is_timed_once_a_step_and_only_in_training() -> None:
    progress, module, x = Progress(), Slow(), torch.zeros(1)
    ComputeTimer(module, progress.meter, progress)
    for step in range(1, WINDOW + 1):
        assert progress.meter.pace() is None
        progress.at(step, "accumulate")
        module(x)
        module(x)
        progress.at(step, "evaluate")
        module(x)
        progress.meter.stepped(step, 1.0, 0.5)
        assert len(progress.meter._compute) == step
    pace = progress.meter.pace()
    assert pace is not None
    assert SECONDS <= pace.compute < 100 * SECONDS
    assert (pace.step, pace.data_wait, pace.whole) == (WINDOW, 0.5, 1.0)


@pytest.mark.gpu
def test_on_a_gpu_what_is_read_has_passed() -> None:
    where = device.device()
    progress, module = Progress(), nn.Linear(4096, 4096, device=where)
    ComputeTimer(module, progress.meter, progress)
    x = torch.zeros(4096, 4096, device=where)
    for step in range(1, WINDOW + 2):
        progress.at(step, "accumulate")
        module(x).sum().item()
        progress.meter.stepped(step, 1.0, 0.0)
    pace = progress.meter.pace()
    assert pace is not None
    assert 1e-5 < pace.compute < 1.0


def test_the_sink_tells_steps_and_writes_who_was_named(tmp_path: Path) -> None:
    stragglers, events, meter = Stragglers(), EventLog(tmp_path / "events.jsonl"), Progress().meter
    sink = PaceSink(meter, stragglers, events)
    for step in (100, 100 + WINDOW):
        paces = {rank: Pace(step, 0.01 * (1 + 0.5 * (rank == 2)), 0.0, 1.0) for rank in range(3)}
        stragglers.look({rank: (f"node-{rank}", pace) for rank, pace in paces.items()})
        sink.write({"step": step, "step_seconds": 1.0, "data_wait_seconds": 0.25})
        sink.write({"step": step, "held_out_loss": 2.0})
    assert list(meter._steps) == [(1.0, 0.25)] * 2
    (event,) = read(tmp_path / "events.jsonl")
    del event["time"]
    about = {"rank": 2, "host": "node-2", "what": "computing", "factor": 1.5, "z_score": 16.7}
    assert event == {"event": "straggler", "step": 100 + WINDOW} | about


def test_other_ranks_write_nothing() -> None:
    meter = Progress().meter
    PaceSink(meter, Stragglers(), None).write({"step": 1, "step_seconds": 2.0, "data_wait_seconds": 0.5})
    assert list(meter._steps) == [(2.0, 0.5)]
