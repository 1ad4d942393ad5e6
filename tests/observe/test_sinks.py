from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megatrain.config import TrainConfig, WandbMode
from megatrain.errors import InputError
from megatrain.observe.records import Record, encode, read
from megatrain.observe.sinks import ConsoleSink, JsonlSink, TensorboardSink, WandbSink, build_sinks


def record(step: int) -> Record:
    return {"step": step, "loss": 9.0 / step, "grad_norm": 1.25, "learning_rate": 1e-3, "step_seconds": 0.5}


def run_config(**wandb: object) -> TrainConfig:
    config = TrainConfig(run_dir="unused", max_steps=100)
    for name, value in wandb.items():
        setattr(config.logger.wandb, name, value)
    return config


@settings(deadline=None, max_examples=30)
@given(stop=st.integers(0, 12), lost=st.integers(0, 5), cut=st.integers(0, 40))
def test_two_parts_of_a_run_make_the_file_of_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, stop: int, lost: int, cut: int
) -> None:
    """A run dies `lost` steps after its checkpoint of step `stop`, `cut` bytes into a line."""
    folder = tmp_path_factory.mktemp("run")
    steps = range(1, 21)
    whole = JsonlSink(folder / "whole.jsonl", 0)
    parts = JsonlSink(folder / "parts.jsonl", 0)
    for step in steps:
        whole.write(record(step))
        if step <= stop + lost:
            parts.write(record(step))
    parts.close()
    with (folder / "parts.jsonl").open("a") as file:
        file.write(encode(record(stop + lost + 1))[:cut])
    parts = JsonlSink(folder / "parts.jsonl", stop)
    for step in steps[stop:]:
        parts.write(record(step))
    parts.flush()
    assert (folder / "parts.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["parts.jsonl", "whole.jsonl"]


def test_evaluations_of_dropped_steps_are_dropped_and_a_line_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    for each in ({"step": 2, "loss": 1.0}, {"step": 2, "held_out_loss": 1.5}, {"step": 4, "held_out_loss": math.nan}):
        sink.write(dict(each))
    lines = path.read_text().splitlines()
    assert json.loads(lines[2]) == {"step": 4, "held_out_loss": None, "non_finite": {"held_out_loss": "nan"}}
    JsonlSink(path, 2)
    assert list(read(path)) == [{"step": 2, "loss": 1.0}, {"step": 2, "held_out_loss": 1.5}]


def test_off_a_terminal_the_console_prints_lines_at_intervals_and_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0

    def monotonic() -> float:
        return now

    monkeypatch.setattr("megatrain.observe.sinks.time.monotonic", monotonic)
    out = io.StringIO()
    console = ConsoleSink(20, 1, Console(file=out, width=200))
    for step in range(1, 21):
        now += 3
        console.write(record(step))
        if step == 2:
            console.write({"step": 2, "held_out_loss": 4.0})
    console.close()
    lines = out.getvalue().splitlines()
    # 3 seconds a step, a line at least 10 seconds after the one before: every 4th step.
    assert [line.split()[1] for line in lines] == ["1/20", "5/20", "9/20", "13/20", "17/20", "20/20"]
    assert lines[1] == "step 5/20  loss 1.8000  grad norm 1.250  lr 1.00e-03  left 0:00:08  held out 4.0000"


def test_on_a_terminal_the_console_keeps_one_line() -> None:
    out = io.StringIO()
    console = ConsoleSink(20, 2, Console(file=out, width=120, force_terminal=True))
    for step in range(1, 6):
        console.write(record(step))
    console.close()
    last = out.getvalue().rsplit("step ", 1)[1]
    assert last.startswith("4/20")
    assert "loss 2.2500" in last


def test_tensorboard_events_are_readable_and_dropped_steps_are_hidden(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    first = TensorboardSink(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": float(step), "skipped": step == 2, "batch_digest": "00ff"})
    first.close()
    second = TensorboardSink(tmp_path, 2)
    second.write({"step": 3, "loss": 30.0})
    second.write({"step": 3, "held_out_loss": 31.0})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "skipped", "held_out_loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(event.step, event.value) for event in events.Scalars("held_out_loss")] == [(3, 31.0)]


def test_tensorboard_asked_for_and_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"logger\.tensorboard\.enabled=true: tensorboard isn't installed"):
        TensorboardSink(tmp_path, 0)


def test_an_offline_wandb_run_is_real_keeps_its_id_on_resume_and_holds_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    for steps in (range(1, 4), range(4, 6)):
        sink = WandbSink(run_config(project="demo", tags=["a"]), run_dir, "5eed0001")
        for step in steps:
            sink.write(record(step) | {"batch_digest": "00ff"})
        run = sink.run.result()
        assert (run.id, run.name, run.project) == ("5eed0001", "my_run", "demo")
        assert run.config["max_steps"] == 100
        assert run.config["precision"] == "bf16"
        assert run.summary["step"] == steps[-1]
        sink.close()
        time.sleep(1.1)  # W&B names the folders of a run by the second
    files = sorted((run_dir / "wandb").glob("offline-run-*-5eed0001/run-5eed0001.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size > 1000 for file in files)
    assert b"learning_rate" in files[1].read_bytes()
    assert not any(secret.encode() in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert capfd.readouterr() == ("", "")


def run_alone(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with a W&B of its own: this process has started one, and tells its children through WANDB_*.

    One that hangs says where.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    deadline = "import faulthandler\nfaulthandler.dump_traceback_later(50, exit=True)\n"
    command = [sys.executable, "-c", deadline + program]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=60, check=False)


def test_wandb_that_is_lost_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
import psutil
from megatrain.config import TrainConfig
from megatrain.observe.sinks import WandbSink
sink = WandbSink(TrainConfig(max_steps=9), Path({str(tmp_path)!r}), "5eed0004")
sink.write({{"step": 1, "loss": 2.0}})
children = psutil.Process().children(recursive=True)
for child in children:
    child.kill()
psutil.wait_procs(children, timeout=10)  # A grandchild stays for as long as process 1 leaves it unreaped.
while not sink.lost:
    sink.write({{"step": 2, "loss": 2.0}})
sink.write({{"step": 3, "loss": 2.0}})
sink.close()
print("went on")
"""
    done = run_alone(program)
    assert done.stdout == "went on\n", done.stderr
    assert done.stderr.count("megatrain train: W&B is lost") == 1


def test_wandb_online_without_a_login_is_an_error(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from megatrain.config import TrainConfig, WandbMode
from megatrain.observe.sinks import WandbSink
config = TrainConfig(max_steps=1)
config.logger.wandb.mode = WandbMode.online
WandbSink(config, Path({str(tmp_path)!r}), "5eed0002")
"""
    done = run_alone(program, NETRC=str(tmp_path / "netrc"))
    assert "InputError: logger.wandb.mode=online: not logged in; use `wandb login`" in done.stderr
    assert not (tmp_path / "wandb").exists()


def test_the_sinks_that_are_built_are_those_asked_for(tmp_path: Path) -> None:
    config = run_config(mode=WandbMode.disabled)
    built = build_sinks(config, tmp_path, 0, "5eed0003")
    assert [type(sink) for sink in built] == [JsonlSink, ConsoleSink]
    config.logger.console.every = 0
    config.logger.tensorboard.enabled = True
    built = build_sinks(config, tmp_path, 0, "5eed0003")
    assert [type(sink) for sink in built] == [JsonlSink, TensorboardSink]
    for sink in built:
        sink.close()
