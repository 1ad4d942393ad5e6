"""Checkpoints of weights alone: what they hold, whole or not at all; the mean of several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatrain.checkpoint import weights
from megatrain.checkpoint.folders import scan
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.weights import MeanReader, write_run, write_weights
from megatrain.errors import GaveUp, InputError
from megatrain.model.initialization import InitialWeights
from megatrain.model.spec import parameters
from tests.huggingface import LLAMA

STATE = TrainerState(
    step=7,
    optimizer_step=0,
    samples=56,
    data={},
    config={"model": {"name": "model"}},
    tokenizer={"sha256": "00", "eos_id": 0},
    wandb_run_id=None,
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path / "tokenizer.json"


class FailsAtTheHead(InitialWeights):
    """What can't be read to the end."""

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        if name == "head.weight":
            raise GaveUp("chunk 7 is altered")
        return super().read(state, name, start, stop)


class Full(InitialWeights):
    """The disk is full by then."""

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        if name == "head.weight":
            raise OSError(28, "No space left on device")
        return super().read(state, name, start, stop)


@pytest.mark.parametrize("block", [weights.BLOCK_ELEMENTS, 1000], ids=["whole", "in blocks"])
def test_it_holds_the_masters_and_says_so(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", block)
    written = InitialWeights(LLAMA, seed=1)
    folder = write_weights(tmp_path, LLAMA, written, STATE)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    reader = CheckpointReader(folder)
    reader.verify_all()
    assert reader.state == {**STATE, "weights_only": True, "version": 1}
    assert set(reader.index) == {("master", parameter.name) for parameter in parameters(LLAMA)}
    for parameter in parameters(LLAMA):
        expected = written.read("master", parameter.name, 0, parameter.size)
        assert torch.equal(reader.read("master", parameter.name, 0, parameter.size), expected)
        assert reader.shapes[parameter.name] == parameter.shape
    with pytest.raises(FileExistsError):
        write_weights(tmp_path, LLAMA, written, STATE)
    assert [(found.step, found.problem) for found in scan(tmp_path)] == [(7, None)]


def test_a_failure_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(GaveUp, match="chunk 7"):
        write_weights(tmp_path / "run", LLAMA, FailsAtTheHead(LLAMA, seed=1), STATE)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    with pytest.raises(GaveUp, match="chunk 7"):
        write_run(tmp_path / "out", LLAMA, FailsAtTheHead(LLAMA, seed=1), STATE, tokenizer)
    with pytest.raises(GaveUp, match="out: not written: No space left on device"):
        write_run(tmp_path / "out", LLAMA, Full(LLAMA, seed=1), STATE, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tokenizer.json"}


def test_a_run_directory(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = write_run(tmp_path / "out", LLAMA, InitialWeights(LLAMA, seed=1), STATE, tokenizer)
    assert folder == tmp_path / "out" / "checkpoints" / "step_00000007"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoints", "config.yaml", "tokenizer.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "config.yaml").read_text() == "model:\n  name: model\n"
    assert json.loads((folder / "commit.json").read_text())["world_size"] == 1
    with pytest.raises(InputError, match=r"output=.*out: exists; give a new or empty folder"):
        write_run(tmp_path / "out", LLAMA, InitialWeights(LLAMA, seed=2), STATE, tokenizer)


class Constant:
    """Every element is one value."""

    optimizer_step = 3

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        assert (state, name) == ("master", "norm.weight")
        return torch.full((stop - start,), self.value, dtype=self.dtype)


def test_the_mean_is_taken_in_float64() -> None:
    # 2^24 + 1 + 1 in fp32 is 2^24: each 1 is rounded away.
    mean = MeanReader([Constant(value, torch.float32) for value in (2.0**24, 1.0, 1.0)])
    expected = torch.full((3,), (2.0**24 + 2) / 3)
    assert torch.equal(mean.read("master", "norm.weight", 2, 5), expected)
    assert torch.equal(mean.read("exp_avg", "norm.weight", 2, 5), torch.zeros(3))
    assert MeanReader([Constant(1.0, torch.float64)]).read("master", "norm.weight", 0, 1).dtype == torch.float64
    assert mean.optimizer_step == 0
