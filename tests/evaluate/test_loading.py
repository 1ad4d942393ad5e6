"""A checkpoint becomes a model, with the tokenizer it was trained with or not at all; the newest that isn't altered."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatrain.__main__ import main
from megatrain.checkpoint.folders import read_state
from megatrain.checkpoint.weights import write_weights
from megatrain.config import Precision
from megatrain.errors import InputError
from megatrain.evaluate.loading import Checkpoint, attempt, load_model, open_step
from tests.evaluate.conftest import LENGTH, MODEL, Run


def itself(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


@pytest.mark.parametrize("precision", list(Precision))
def test_the_model_has_the_weights_of_the_checkpoint(trained: Run, precision: Precision) -> None:
    checkpoint = attempt(trained.run_dir, itself)
    assert (checkpoint.model, checkpoint.sequence_length, checkpoint.eos_id) == (MODEL, LENGTH, 0)
    model = load_model(checkpoint.reader, checkpoint.model, precision)
    for name, parameter in model.named_parameters():
        expected = trained.reader.read("master", name, 0, parameter.numel())
        assert torch.equal(parameter.view(-1), expected.to(parameter.dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {
        {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32, Precision.fp64: torch.float64}[precision]
    }
    assert model.head.weight is model.embedding.weight
    assert torch.get_default_dtype() == torch.float32


def test_another_tokenizer_is_refused(trained: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained.run_dir, run_dir)
    step = run_dir / "checkpoints" / "step_00000003"
    assert open_step(step).tokenizer_path == run_dir / "tokenizer.json"
    (run_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: not the tokenizer that .*step_00000003 was trained with"):
        _ = attempt(run_dir, itself).tokenizer_path
    (run_dir / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"run/tokenizer.json: missing"):
        _ = open_step(step).tokenizer_path


@pytest.fixture
def two_steps(trained: Run, tmp_path: Path) -> Path:
    """A run directory with a good checkpoint of step 3, and of step 4 one with a bit flipped in its last tensor."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained.run_dir, run_dir)
    state = read_state(trained.run_dir / "checkpoints" / "step_00000003")
    newest = write_weights(run_dir, MODEL, trained.reader, {**state, "step": 4})
    data = newest / "rank_00000.bin"
    data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
    return run_dir


PASSED_OVER = "step_00000004/rank_00000.bin: chunk 1 (of 65536 bytes) is altered"


def test_an_altered_checkpoint_is_passed_over(
    two_steps: Path, trained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commands = {
        "eval": [f"data.path={trained.data}"],
        "generate": ["max_new_tokens=2"],
        "export": [f"output={tmp_path / 'hf'}"],
    }
    for command, arguments in commands.items():
        caplog.clear()
        assert main([command, f"checkpoint={two_steps}", *arguments]) == 0
        assert [record.getMessage() for record in caplog.records] == [
            f"passed over: {two_steps}/checkpoints/{PASSED_OVER}"
        ]


def test_an_altered_checkpoint_that_was_named_is_an_error(
    two_steps: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    newest = two_steps / "checkpoints" / "step_00000004"
    assert main(["generate", f"checkpoint={newest}"]) == 3
    assert capsys.readouterr().err == f"megatrain generate: {two_steps}/checkpoints/{PASSED_OVER}\n"
    assert caplog.records == []
    # And where every one is, the oldest says so.
    shutil.rmtree(two_steps / "checkpoints" / "step_00000003")
    assert main(["generate", f"checkpoint={two_steps}"]) == 3
    assert capsys.readouterr().err == f"megatrain generate: {two_steps}/checkpoints/{PASSED_OVER}\n"
