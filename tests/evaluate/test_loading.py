"""A checkpoint becomes a model, with the tokenizer it was trained with or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatrain.config import Precision
from megatrain.errors import InputError
from megatrain.evaluate.loading import load_model, open_checkpoint
from tests.evaluate.conftest import LENGTH, MODEL, Run


@pytest.mark.parametrize("precision", list(Precision))
def test_the_model_has_the_weights_of_the_checkpoint(trained: Run, precision: Precision) -> None:
    checkpoint = open_checkpoint(trained.run_dir)
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
    assert open_checkpoint(step).tokenizer_path == run_dir / "tokenizer.json"
    (run_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: not the tokenizer that .*step_00000003 was trained with"):
        _ = open_checkpoint(run_dir).tokenizer_path
    (run_dir / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"run/tokenizer.json: missing"):
        _ = open_checkpoint(step).tokenizer_path
