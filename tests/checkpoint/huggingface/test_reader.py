"""A Hugging Face folder gives any range of our parameters, bit for bit; one that isn't whole is refused when opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatrain.checkpoint.huggingface import export as export_module
from megatrain.checkpoint.huggingface.config import hugging_face_config
from megatrain.checkpoint.huggingface.export import export
from megatrain.checkpoint.huggingface.reader import HuggingFaceReader
from megatrain.checkpoint.huggingface.tensors import assemble, tensors
from megatrain.config import ModelConfig, Precision
from megatrain.errors import InputError
from megatrain.model.initialization import InitialWeights
from megatrain.model.spec import parameters
from megatrain.model.transformer import Transformer
from tests.huggingface import LLAMA, MODELS


def export_to(folder: Path, tokenizer: Path, model: ModelConfig, precision: Precision = Precision.fp32) -> Path:
    export(InitialWeights(model, seed=1), model, tokenizer, folder, precision, sequence_length=32, eos_id=0)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("folders")
    return {name: export_to(folder / name, tokenizer, model) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_was_exported_is_read_bit_for_bit(folders: dict[str, Path], name: str) -> None:
    reader, exported = HuggingFaceReader(folders[name]), InitialWeights(MODELS[name], seed=1)
    assert replace(reader.description.model, name="model") == MODELS[name]
    for parameter in parameters(MODELS[name]):
        expected = exported.read("master", parameter.name, 0, parameter.size)
        assert torch.equal(reader.read("master", parameter.name, 0, parameter.size), expected)
        assert torch.equal(reader.read("exp_avg", parameter.name, 1, 4), torch.zeros(3))
    assert reader.optimizer_step == 0


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range(folders: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(MODELS)))
    parameter = data.draw(st.sampled_from(parameters(MODELS[name])))
    start = data.draw(st.integers(0, parameter.size))
    stop = data.draw(st.integers(start, parameter.size))
    read = HuggingFaceReader(folders[name]).read("master", parameter.name, start, stop)
    assert torch.equal(read, InitialWeights(MODELS[name], seed=1).read("master", parameter.name, start, stop))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_computes_the_same(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**hugging_face_config(model, Precision.fp32, 32, eos_id=0))
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    reader = HuggingFaceReader(tmp_path)
    for tensor in tensors(model):
        # Back in the folder's dtype they are the same bits.
        assert torch.equal(assemble(reader, tensor, dtype), theirs.state_dict()[tensor.name])
    ours = Transformer(model)
    for parameter_name, parameter in ours.named_parameters():
        parameter.data.copy_(reader.read("master", parameter_name, 0, parameter.numel()).view_as(parameter))
    ids = torch.arange(30, dtype=torch.int32)[None]
    with torch.no_grad():
        in_fp32 = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        expected = in_fp32(ids.long()).logits
        assert expected.std() > 0.3
        assert (ours(ids, ids, torch.zeros_like(ids)) - expected).abs().max() <= 1e-5


def test_a_model_in_fp64_stays_one(tmp_path: Path, tokenizer: Path) -> None:
    reader = HuggingFaceReader(export_to(tmp_path / "out", tokenizer, LLAMA, Precision.fp64))
    assert reader.read("master", "layers.0.mlp.gate_up.weight", 5, 9).dtype == torch.float64
    assert reader.read("exp_avg", "layers.0.mlp.gate_up.weight", 5, 9).dtype == torch.float64


def test_several_files_with_an_index_or_without(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 60_000)
    folder = export_to(tmp_path / "out", tokenizer, LLAMA)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    expected = InitialWeights(LLAMA, seed=1).read("master", "head.weight", 0, 300 * 64)
    assert torch.equal(HuggingFaceReader(folder).read("master", "head.weight", 0, 300 * 64), expected)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    index.unlink()
    assert torch.equal(HuggingFaceReader(folder).read("master", "head.weight", 0, 300 * 64), expected)

    (folder / "model-copy.safetensors").write_bytes(files[0].read_bytes())
    with pytest.raises(
        InputError, match=r"model-copy\.safetensors: model\.embed_tokens\.weight is in another file too"
    ):
        HuggingFaceReader(folder)
    index.write_text(whole)
    HuggingFaceReader(folder)
    files[2].unlink()
    with pytest.raises(InputError, match=rf"{files[2].name}: missing; model\.safetensors\.index\.json names it"):
        HuggingFaceReader(folder)
    index.write_text('{"weight_map": []}')
    with pytest.raises(InputError, match=r"index\.json: no index of safetensors files"):
        HuggingFaceReader(folder)


def test_an_index_names_no_file_elsewhere(tmp_path: Path, tokenizer: Path) -> None:
    folder = export_to(tmp_path / "out", tokenizer, LLAMA)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys((tensor.name for tensor in tensors(LLAMA)), "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match=r"index\.json: \.\./elsewhere\.safetensors isn't in the folder"):
        HuggingFaceReader(folder)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(DOWN), f"{DOWN} is missing, of 21 tensors 1"),
        (lambda held: held.update(more=torch.zeros(2)), "more is no tensor of the model that config.json describes"),
        (lambda held: held.update({DOWN: held[DOWN].t().contiguous()}), f"{DOWN} has the shape [96, 64], config.json"),
        (lambda held: held.update({DOWN: held[DOWN].to(torch.int8)}), f"{DOWN} is in I8; legal: F64, F32, BF16, F16"),
    ],
    ids=["missing", "left over", "shape", "dtype"],
)
def test_other_tensors_than_described_are_named(
    tmp_path: Path, tokenizer: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = export_to(tmp_path / "out", tokenizer, LLAMA)
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(InputError) as raised:
        HuggingFaceReader(folder)
    assert str(raised.value).startswith(f"{folder}: {message}")


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path: Path, tokenizer: Path) -> None:
    folder = export_to(tmp_path / "out", tokenizer, replace(LLAMA, tie_embeddings=True))
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(held, folder / "model.safetensors")
    assert HuggingFaceReader(folder).description.model.tie_embeddings
    other = held["lm_head.weight"].clone()
    other[-1, -1] += 1
    for head in (other, held["lm_head.weight"].double()):
        save_file({**held, "lm_head.weight": head}, folder / "model.safetensors")
        with pytest.raises(InputError, match=r"lm_head\.weight isn't model\.embed_tokens\.weight, and config\.json"):
            HuggingFaceReader(folder)


def test_only_whole_safetensors_are_read(tmp_path: Path, tokenizer: Path) -> None:
    folder = export_to(tmp_path / "out", tokenizer, LLAMA)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: no whole safetensors file"):
        HuggingFaceReader(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"out: no model\*\.safetensors in it$"):
        HuggingFaceReader(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"safetensors in it; pytorch_model\.bin is pickle, which isn't read"):
        HuggingFaceReader(folder)
