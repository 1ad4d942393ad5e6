from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples import demo
from examples.demo import BarMissed, Demo, Failed, make_folder, steps_in
from megatrain.errors import InputError
from megatrain.observe.records import Record
from megatrain.observe.sinks import JsonlSink


def new_demo(folder: Path) -> Demo:
    make_folder(folder)
    return Demo(folder, Console(file=io.StringIO()))


def write_losses(made: Demo, losses: list[float]) -> None:
    (made.output / "run").mkdir()
    sink = JsonlSink(made.output / "run" / "metrics.jsonl", 0)
    for step, loss in enumerate(losses, 1):
        sink.write({"step": step, "loss": loss})
    sink.write({"step": len(losses), "held_out_loss": 99.0})


def test_only_a_folder_of_its_own_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    make_folder(folder)
    (folder / "old").touch()
    make_folder(folder)
    assert not (folder / "old").exists()
    assert (folder / "logs").is_dir()
    other = tmp_path / "other"
    other.mkdir()
    make_folder(other)
    (tmp_path / "file").touch()
    for theirs in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="wasn't made by the demo"):
            make_folder(theirs)
    assert folder.is_dir()


def test_a_stage_ends_as_expected_or_is_named_with_its_last_line_and_its_log(tmp_path: Path) -> None:
    made = new_demo(tmp_path / "demo")
    program = "import sys; print('one'); print('two'); sys.exit(75)"
    assert made.stage("train", [sys.executable, "-c", program], expected=75) == "one\ntwo"
    assert list(made.seconds) == ["train"]
    log = tmp_path / "demo/logs/train.log"
    assert log.read_text().startswith(f"$ {sys.executable} -c 'import sys;")
    with pytest.raises(Failed, match=rf"^train: exit code 75, not 0: two \(see {log}\)$"):
        made.stage("train", [sys.executable, "-c", program])


def test_a_stage_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STAGE_SECONDS", 0.2)
    made = new_demo(tmp_path / "demo")
    with pytest.raises(Failed, match="sleep: exit code -15, not 0: it printed nothing"):
        made.stage("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])


def test_the_length_of_the_training_follows_from_the_time_of_a_step() -> None:
    def probed(seconds: float) -> list[Record]:
        record: Record = {"step": 1, "step_seconds": seconds}
        return [{"step": 1, "step_seconds": 9.0}, *[record] * 4]

    assert steps_in(100, probed(0.25)) == 400
    assert steps_in(100, probed(0.001)) == demo.MAX_STEPS
    assert steps_in(100, probed(50.0)) == demo.MIN_STEPS


def test_the_bars_are_the_loss_at_the_end_and_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = new_demo(tmp_path / "good")
    write_losses(made, [9.0, *[6.0] * 30, *[5.8] * 20])
    made.check()
    monkeypatch.setattr(demo, "BUDGET_SECONDS", 0)
    with pytest.raises(BarMissed, match="took 0 s, bar 0 s"):
        made.check()
    made = new_demo(tmp_path / "bad")
    write_losses(made, [9.0, *[5.0] * 30, *[5.9] * 20])
    with pytest.raises(BarMissed, match=r"the loss at the end is 65\.6% of the first, bar 65%"):
        made.check()
