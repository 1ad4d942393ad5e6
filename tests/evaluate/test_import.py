"""`megatrain import`: in and out again bit for bit, and what is imported does all that a checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from megatrain.__main__ import main
from megatrain.checkpoint.folders import read_state
from megatrain.checkpoint.huggingface.config import hugging_face_config
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import Precision
from megatrain.evaluate.loading import attempt
from megatrain.model.spec import parameters
from tests.evaluate.conftest import LENGTH, MODEL, Run
from tests.huggingface import MODELS
from tests.tokenizer import make_tokenizer


def make_folder(folder: Path, name: str) -> Path:
    """A model of transformers in bf16, saved by transformers."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**hugging_face_config(MODELS[name], Precision.bf16, LENGTH, eos_id=0))
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_again(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder(tmp_path / name, name)
    assert main(["import", f"source={source}", f"output={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert main(["inspect", f"path={tmp_path / 'run'}"]) == 0
    assert main(["export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}", "precision=bf16"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape)
        assert torch.equal(tensor, after[key])
    ids = torch.arange(30)[None]
    with torch.no_grad():
        first, second = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (source, tmp_path / "out")
        )
    assert torch.equal(first, second)


def test_out_and_in_again(trained: Run, tmp_path: Path) -> None:
    assert main(["export", f"checkpoint={trained.run_dir}", f"output={tmp_path / 'hf'}"]) == 0
    assert main(["import", f"source={tmp_path / 'hf'}", f"output={tmp_path / 'run'}"]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step_00000000"
    reader = CheckpointReader(folder)
    for parameter in parameters(MODEL):
        expected = trained.reader.read("master", parameter.name, 0, parameter.size)
        assert torch.equal(reader.read("master", parameter.name, 0, parameter.size), expected)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (trained.run_dir / "tokenizer.json").read_bytes()
    state, old = read_state(folder), read_state(trained.run_dir / "checkpoints" / "step_00000003")
    assert state["config"]["model"] == {**old["config"]["model"], "name": "hf"}
    assert (state["tokenizer"], state["weights_only"], state["optimizer_step"]) == (old["tokenizer"], True, 0)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == state["config"]


def test_the_folder_itself_is_a_checkpoint(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"checkpoint={trained.run_dir}", f"output={tmp_path / 'hf'}"]) == 0
    results = []
    for checkpoint in (trained.run_dir, tmp_path / "hf"):
        output = tmp_path / "out.json"
        assert main(["eval", f"checkpoint={checkpoint}", f"data.path={trained.data}", f"output={output}"]) == 0
        results.append(json.loads(output.read_text()))
    assert results[0]["loss"] == results[1]["loss"]
    assert (results[1]["step"], results[1]["sequence_length"]) == (0, LENGTH)
    capsys.readouterr()
    assert main(["generate", f"checkpoint={trained.run_dir}", "max_new_tokens=10"]) == 0
    assert main(["generate", f"checkpoint={tmp_path / 'hf'}", "max_new_tokens=10"]) == 0
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]
    assert main(["export", f"checkpoint={tmp_path / 'hf'}", f"output={tmp_path / 'again'}"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert attempt(tmp_path / "hf", lambda checkpoint: checkpoint.objective).name == "causal"


def test_what_is_not_a_model_of_ours_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error() -> str:
        assert main(["import", f"source={tmp_path / 'hf'}", f"output={tmp_path / 'run'}"]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1].removeprefix("megatrain import: ")

    assert error() == f"source={tmp_path / 'hf'}: no config.json in it; give a Hugging Face folder"
    source = make_folder(tmp_path / "hf", "Llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "logit_scale": 2.0}))
    assert error().startswith(f"{source}/config.json: logit_scale=2.0: this program doesn't know the key")
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 301}))
    assert error().startswith(
        f"{source}: model.embed_tokens.weight has the shape [300, 64], config.json says [301, 64]"
    )
    (source / "config.json").write_text(json.dumps(config))
    make_tokenizer(source / "tokenizer.json", vocab_size=310)
    assert error() == f"{source}/tokenizer.json: 302 ids, the model has model.vocab_size=300"
    (source / "tokenizer.json").unlink()
    assert error().startswith(f"{source}/tokenizer.json: missing; save the tokenizer with transformers' AutoTokenizer")
