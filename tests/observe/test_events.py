from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch

from megatrain.observe.events import EventLog, SkipSink, versions
from megatrain.observe.records import read


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
    sink = SkipSink(EventLog(tmp_path / "events.jsonl"))
    sink.write({"step": 4, "loss": 1.0, "grad_norm": 2.0, "target_count": 9, "skipped": False})
    sink.write({"step": 4, "held_out_loss": 1.0})
    sink.write({"step": 5, "loss": math.nan, "grad_norm": math.inf, "target_count": 9, "skipped": True})
    line = json.loads((tmp_path / "events.jsonl").read_text())
    assert (line["event"], line["step"], line["loss"], line["target_count"]) == ("skip", 5, None, 9)
    assert line["non_finite"] == {"loss": "nan", "grad_norm": "inf"}


def test_the_versions_are_those_that_are_imported() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert set(found) == {"python", "megatrain", "torch", "deepspeed", "transformers"}
