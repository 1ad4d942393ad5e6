"""Export: transformers opens it and computes the same; it is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

from megatrain.checkpoint.huggingface import export as export_module
from megatrain.config import ModelConfig, Norm, Precision, RopeScaling
from megatrain.errors import GaveUp, InputError
from megatrain.model.initialization import InitialWeights
from megatrain.model.transformer import Transformer
from tests.huggingface import LLAMA, MODELS
from tests.tokenizer import EOS

CONFIG = replace(LLAMA, rope_scaling=RopeScaling(original_context=32), attention_bias=True)


def export(
    tokenizer: Path,
    output: Path,
    config: ModelConfig = CONFIG,
    precision: Precision = Precision.fp32,
    eos_id: int = 0,
) -> InitialWeights:
    reader = InitialWeights(config, seed=1)
    export_module.export(reader, config, tokenizer, output, precision, sequence_length=32, eos_id=eos_id)
    return reader


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(tokenizer: Path, tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    reader = export(tokenizer, tmp_path / "out", config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == f"{name.split()[0]}ForCausalLM"
    ours = Transformer(config)
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(reader.read("master", name, 0, parameter.numel()).view_as(parameter))
    ids = torch.arange(30, dtype=torch.int32)[None]
    with torch.no_grad():
        expected = ours(ids, ids, torch.zeros_like(ids))
        assert expected.std() > 0.3
        assert (theirs(ids.long()).logits - expected).abs().max() <= 1e-5


def test_the_tokenizer_comes_along(tokenizer: Path, tmp_path: Path) -> None:
    export(tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the  words of Ünïcode\n\tand 汉字"
    assert theirs.encode(text) == Tokenizer.from_file(str(tokenizer)).encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (EOS, 0)


def test_large_models_become_several_files(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tokenizer, tmp_path / "one", precision=Precision.bf16)
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 60_000)
    export(tokenizer, tmp_path / "many", precision=Precision.bf16)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 62_000
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as one:
        assert set(index["weight_map"]) == set(one.keys())
        assert index["metadata"]["total_size"] == sum(one.get_tensor(name).nbytes for name in one.keys())  # noqa: SIM118
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "many" / file, "pt") as part:
                tensor = part.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, one.get_tensor(name))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, norm=Norm.layer), "model.norm=layer: "),
        (
            replace(CONFIG, qk_norm=True, mlp_bias=True),
            "model.mlp_bias=True: no Hugging Face architecture has it together",
        ),
        (
            replace(CONFIG, qk_norm=True, attention_out_bias=False),
            "model.attention_out_bias=False: Hugging Face's Qwen3",
        ),
        (replace(CONFIG, attention_out_bias=False, mlp_bias=True), "model.mlp_bias=True: no Hugging Face architecture"),
        (replace(CONFIG, sliding_window=8), "model.attention_bias=True: "),
        (replace(CONFIG, num_heads=6, head_dim=16), "model.num_heads=6: has to divide model.hidden_size=64"),
    ],
)
def test_what_no_architecture_expresses_is_named(
    tokenizer: Path, tmp_path: Path, config: ModelConfig, message: str
) -> None:
    with pytest.raises(InputError) as raised:
        export(tokenizer, tmp_path / "out", config)
    assert str(raised.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_other_bad_input_is_named(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"290 ids, the model has model.vocab_size=280"):
        export(tokenizer, tmp_path / "out", replace(CONFIG, vocab_size=280))
    with pytest.raises(InputError, match="has no id 295"):
        export(tokenizer, tmp_path / "out", eos_id=295)
    export(tokenizer, tmp_path / "out")
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"output=.*: exists; give a new or empty folder"):
        export(tokenizer, tmp_path / "out")
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "empty").mkdir()
    export(tokenizer, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == set(before)


class FailsAtTheHead(InitialWeights):
    """A checkpoint whose last parameter can't be read."""

    def read(self, state: str, name: str, start: int, stop: int) -> torch.Tensor:
        if name == "head.weight":
            raise GaveUp("chunk 7 is altered")
        return super().read(state, name, start, stop)


def test_a_failure_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    reader = FailsAtTheHead(CONFIG, seed=1)
    with pytest.raises(GaveUp, match="chunk 7"):
        export_module.export(reader, CONFIG, tokenizer, tmp_path / "out", Precision.fp32, 32, eos_id=0)
    assert list(tmp_path.iterdir()) == []
