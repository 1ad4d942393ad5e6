"""`megatrain average`: the mean of the checkpoints that were asked for, or one line that says why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.__main__ import main
from megatrain.checkpoint.folders import read_state
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.weights import write_weights
from megatrain.model.initialization import InitialWeights
from megatrain.model.spec import parameters
from tests.evaluate.conftest import MODEL, Run


def save(run_dir: Path, step: int, model: dict[str, Any] | None = None) -> Path:
    """A checkpoint with weights of its own."""
    state = read_state(run_dir / "checkpoints" / "step_00000003")
    config = {**state["config"], "model": {**state["config"]["model"], **(model or {})}}
    return write_weights(run_dir, MODEL, InitialWeights(MODEL, seed=step), {**state, "step": step, "config": config})


@pytest.fixture
def run_dir(trained: Run, tmp_path: Path) -> Path:
    """Steps 3, 4, 5 and 8."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    for step in (4, 5, 8):
        save(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("argument", "seeds"), [("last=3", [8, 5, 4]), ("last=1", [8]), ("steps=[4,8]", [8, 4])], ids=str
)
def test_the_mean(
    run_dir: Path, tmp_path: Path, argument: str, seeds: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mean"
    assert main(["average", f"checkpoint={run_dir}", argument, f"output={output}"]) == 0
    folder = output / "checkpoints" / "step_00000008"
    assert capsys.readouterr().out == f"{folder}\n"
    reader = CheckpointReader(folder)
    for parameter in parameters(MODEL):
        held = [InitialWeights(MODEL, seed).read("master", parameter.name, 0, parameter.size) for seed in seeds]
        expected = torch.stack([tensor.double() for tensor in held]).mean(0).float()
        assert torch.equal(reader.read("master", parameter.name, 0, parameter.size), expected)
    assert reader.state["weights_only"]
    assert (reader.state["step"], reader.state["optimizer_step"]) == (8, 0)
    assert main(["generate", f"checkpoint={output}", "max_new_tokens=2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "last or steps: give one of them, how many checkpoints or which"),
        (["last=2", "steps=[3]"], "last or steps: give one of them, how many checkpoints or which"),
        (["last=5"], "last=5: legal: 1 to 4, which {run} holds whole"),
        (["last=0"], "last=0: legal: 1 to 4, which {run} holds whole"),
        (["steps=[3,6]"], "steps=[3, 6]: {run} holds no whole checkpoint 6; legal: 8, 5, 4, 3"),
    ],
)
def test_what_is_not_there_is_one_line(
    run_dir: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["average", f"checkpoint={run_dir}", f"output={tmp_path / 'mean'}", *arguments]) == 2
    assert capsys.readouterr().err == f"megatrain average: {message.format(run=run_dir)}\n"
    assert not (tmp_path / "mean").exists()


def test_what_is_no_run_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["average", f"checkpoint={tmp_path}", f"output={tmp_path / 'mean'}", "last=1"]) == 2
    assert capsys.readouterr().err == (
        f"megatrain average: checkpoint={tmp_path}: holds no whole checkpoint; give a run directory\n"
    )


def test_only_checkpoints_of_one_model_have_a_mean(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"checkpoint={run_dir}", f"output={tmp_path / 'mean'}"]
    save(run_dir, 9, {"rope_theta": 500.0})
    assert main(["average", *arguments, "last=2"]) == 2
    folder = run_dir / "checkpoints"
    assert capsys.readouterr().err == (
        f"megatrain average: {folder}/step_00000008: another model than {folder}/step_00000009\n"
    )
    # A name is no difference.
    save(run_dir, 10, {"name": "renamed"})
    assert main(["average", *arguments, "steps=[8,10]"]) == 0


def test_an_altered_checkpoint_leaves_nothing(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run_dir / "checkpoints" / "step_00000005" / "rank_00000.bin"
    data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
    assert main(["average", f"checkpoint={run_dir}", "last=2", f"output={tmp_path / 'mean'}"]) == 3
    assert capsys.readouterr().err.startswith(f"megatrain average: {data}: chunk 1 ")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
