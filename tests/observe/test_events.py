from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch

from megatrain.observe.events import EventLog, SkipSink, versions
from megatrain.observe.records import Record, read
from megatrain.resilience.anomalies import Anomalies
from megatrain.resilience_config import AnomaliesConfig


def test_events_are_added_also_after_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("start", 0, world_size=2, versions={"torch": "x"})
    log.close()
    with path.open("a") as file:
        file.write('{"event": "sa')
    log = EventLog(path)
    log.write("resume", 3)
    log.close()
    events: list[dict[str, object]] = [dict(event) for event in read(path)]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("resume", 3)]
    assert events[0]["world_size"] == 2
    now = events[1]["time"]
    assert isinstance(now, float)
    assert abs(now - time.time()) < 60


def test_a_skipped_step_is_an_event_that_json_can_say(tmp_path: Path) -> None:
    sink = SkipSink(Anomalies(AnomaliesConfig(), lag=0), EventLog(tmp_path / "events.jsonl"))
    samples: Record = {"target_count": 9, "first_sample": 40, "last_sample": 47}
    sink.write(samples | {"step": 4, "loss": 1.0, "grad_norm": 2.0, "skipped": False})
    sink.write({"step": 4, "held_out_loss": 1.0})
    sink.write(samples | {"step": 5, "loss": math.nan, "grad_norm": math.inf, "skipped": True})
    line = json.loads((tmp_path / "events.jsonl").read_text())
    assert (line["event"], line["step"], line["loss"], line["reason"]) == ("skip", 5, None, "loss nan")
    assert {name: line[name] for name in samples} == samples
    assert line["non_finite"] == {"loss": "nan", "grad_norm": "inf"}


def test_ranks_that_write_no_events_learn_of_the_steps_too() -> None:
    anomalies = Anomalies(AnomaliesConfig(), lag=0)
    sink = SkipSink(anomalies, None)
    samples: Record = {"target_count": 9, "first_sample": 40, "last_sample": 47}
    sink.write(samples | {"step": 1, "loss": 1.0, "grad_norm": 2.0, "skipped": False})
    sink.write(samples | {"step": 2, "loss": 9.0, "grad_norm": math.nan, "skipped": True})
    assert anomalies.state()["good"] == [(1, 1.0, 2.0)]
    assert anomalies.state()["bad"] == [(2, 47, "gradient norm nan")]


def test_the_versions_are_those_that_are_imported() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert set(found) == {"python", "megatrain", "torch", "deepspeed", "transformers"}
