"""config.json: what is written is read as the same model, transformers' own too; what is no model of ours is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatrain.checkpoint.huggingface.config import hugging_face_config, read_config
from megatrain.compose import compose
from megatrain.config import ModelConfig, Precision, RopeScaling
from megatrain.errors import InputError
from megatrain.model.spec import parameter_count
from tests.huggingface import LLAMA, MODELS


def config_of(model: ModelConfig) -> dict[str, Any]:
    return hugging_face_config(model, Precision.bf16, sequence_length=64, eos_id=3)


def read(folder: Path, values: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return replace(read_config(folder).model, name="model")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_written_is_read_as_the_same_model(tmp_path: Path, model: ModelConfig) -> None:
    assert read(tmp_path, config_of(model)) == model
    found = read_config(tmp_path)
    assert (found.model.name, found.sequence_length, found.eos_id) == (tmp_path.name, 64, 3)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_transformers_writes_is_read_as_the_same_model(tmp_path: Path, model: ModelConfig) -> None:
    """With rope_parameters and layer_types."""
    transformers.AutoConfig.for_model(**config_of(model)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_parameters"]["rope_theta"] == 500.0
    assert "rope_theta" not in values
    assert read(tmp_path, values) == model


LLAMA_3_2_1B = """
{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
 "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
 "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
 "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
 "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
 "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
 "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}
"""
MISTRAL_7B = """
{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
 "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
 "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}
"""
QWEN_2_5_HALF_B = """
{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
 "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
 "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
 "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
 "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
 "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}
"""
QWEN3_0_6B = """
{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
 "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
 "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
 "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
 "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
 "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
 "vocab_size": 151936}
"""


@pytest.mark.parametrize(
    ("text", "count", "window"),
    [
        (LLAMA_3_2_1B, 1_235_814_400, None),
        (MISTRAL_7B, 7_241_732_096, 4096),
        (QWEN_2_5_HALF_B, 494_032_768, None),
        (QWEN3_0_6B, 596_049_920, None),
    ],
    ids=["Llama 3.2 1B", "Mistral 7B", "Qwen2.5 0.5B", "Qwen3 0.6B"],
)
def test_published_models_have_their_published_counts(
    tmp_path: Path, text: str, count: int, window: int | None
) -> None:
    model = read(tmp_path, json.loads(text))
    assert parameter_count(model) == count
    assert model.sliding_window == window
    if text == LLAMA_3_2_1B:
        preset = compose("train", ["model=llama_1b", "run_dir=r", "max_steps=1"]).model
        assert model == replace(preset, name="model")


DEFAULTS = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, sliding_window=4096),
    "qwen2": replace(LLAMA, attention_bias=True, attention_out_bias=False),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=128),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_an_absent_key_is_what_transformers_takes_it_for(tmp_path: Path, kind: str) -> None:
    values: dict[str, Any] = {"model_type": kind, "vocab_size": 300, "hidden_size": 256, "num_hidden_layers": 2}
    values |= {
        "num_attention_heads": 32,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "eos_token_id": [3, 4],
    }
    theirs = transformers.AutoConfig.for_model(**values)
    kv_heads = {"mistral": 8}.get(kind, 32)
    expected = replace(
        DEFAULTS[kind], hidden_size=256, num_heads=32, num_kv_heads=kv_heads, norm_eps=1e-6, rope_theta=10000.0
    )
    assert read(tmp_path, values) == replace(expected, initializer_std=0.02)
    assert (theirs.num_key_value_heads, theirs.sliding_window if kind == "mistral" else None, theirs.rms_norm_eps) == (
        kv_heads,
        expected.sliding_window,
        1e-6,
    )
    assert getattr(theirs, "head_dim", 8) == (expected.head_dim or 8)
    assert theirs.rope_parameters["rope_theta"] == 10000.0
    assert read_config(tmp_path).eos_id == 3


def test_the_end_of_documents_may_stand_in_the_other_file(tmp_path: Path) -> None:
    values = config_of(LLAMA) | {"eos_token_id": None}
    with pytest.raises(InputError, match=r"config\.json: eos_token_id=null: an id below vocab_size=300 is needed"):
        read(tmp_path, values)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    read(tmp_path, values)
    assert read_config(tmp_path).eos_id == 7
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 300}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id=300: "):
        read(tmp_path, values)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Llama", {"model_type": "gemma"}, "model_type=gemma: legal: llama, mistral, qwen2, qwen3"),
        ("Llama", {"model_type": ["llama"]}, "model_type=['llama']: legal: llama, mistral, qwen2, qwen3"),
        ("Llama", {"max_position_embeddings": 0}, "max_position_embeddings=0: has to be above 0"),
        ("Llama", {"architectures": ["LlamaModel"]}, 'architectures=["LlamaModel"]: legal: ["LlamaForCausalLM"]'),
        ("Llama", {"hidden_act": "gelu"}, 'hidden_act="gelu": not expressible; legal: "silu"'),
        ("Llama", {"attention_multiplier": 0.5}, "attention_multiplier=0.5: this program doesn't know the key"),
        ("Llama", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}: this program doesn\'t know'),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: not expressible; legal: 0"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: not expressible; legal: 1"),
        ("Llama", {"rope_scaling": YARN}, 'rope_scaling.rope_type="yarn": legal: default, llama3'),
        ("Llama", {"rope_scaling": {**LLAMA3, "factor": "8"}}, 'rope_scaling.factor="8": a number is needed'),
        ("Llama", {"rope_scaling": {**LLAMA3, "beta": 1}}, "rope_scaling.beta=1: this program doesn't know the key"),
        ("Llama", {"rope_scaling": 8}, "rope_scaling=8: an object is needed"),
        ("Llama", {"rope_parameters": LLAMA3}, "rope_scaling="),
        ("Qwen3", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention={}: this program"),
        ("Llama", {"sliding_window": 8}, "sliding_window=8: this program doesn't know the key"),
        ("Mistral", {"mlp_bias": True}, "mlp_bias=true: not expressible; legal: false"),
        ("Mistral", {"layer_types": ["full_attention"] * 2}, "layer_types="),
        (
            "Qwen3 with window",
            {"max_window_layers": 1},
            "max_window_layers=1: the layers before it would have no window",
        ),
        (
            "Qwen3 with window",
            {"layer_types": ["full_attention", "sliding_attention"]},
            'layer_types=["full_attention", "sliding_attention"]: legal: full_attention in all layers; ',
        ),
        ("Qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types="),
        ("Llama", {"hidden_size": "64"}, 'hidden_size="64": a whole number is needed'),
        ("Llama", {"num_hidden_layers": None}, "num_hidden_layers=null: a whole number is needed"),
        ("Mistral", {"sliding_window": 0}, "model.sliding_window=0: has to be above 0"),
        ("Llama", {"tie_word_embeddings": "yes"}, 'tie_word_embeddings="yes": legal: false, true'),
        ("Llama", {"num_key_value_heads": 3}, "model.num_kv_heads=3: has to divide model.num_heads=4"),
    ],
)
def test_what_is_not_our_model_is_named(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path, config_of(MODELS[kind]) | changes)
    assert str(raised.value).startswith(f"{tmp_path}/config.json: {message}")
    assert "\n" not in str(raised.value)


def test_what_changes_no_number_passes(tmp_path: Path) -> None:
    values = config_of(LLAMA) | {
        "is_llama_config": True,
        "pretraining_tp": 2,
        "rope_interleaved": False,
        "some_new_thing": None,
        "temperature": 0.6,
        "transformers.js_config": {"dtype": "q4"},
        "use_cache": True,
    }
    assert read(tmp_path, values) == LLAMA
    # Qwen's window counts from a layer that the model hasn't got, or not at all.
    qwen = config_of(MODELS["Qwen2"]) | {"sliding_window": 4096}
    assert read(tmp_path, qwen) == MODELS["Qwen2"]
    assert read(tmp_path, qwen | {"use_sliding_window": True, "max_window_layers": 2}) == MODELS["Qwen2"]


def test_llama3_scaling_of_older_files(tmp_path: Path) -> None:
    """Without the original context, which then is max_position_embeddings."""
    model = replace(LLAMA, rope_scaling=RopeScaling(original_context=64))
    assert read(tmp_path, config_of(LLAMA) | {"rope_scaling": LLAMA3}) == model


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ('{"a": NaN}', "not JSON"), ("[]", "not a JSON object")]
)
def test_what_is_no_json_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_config(tmp_path)
