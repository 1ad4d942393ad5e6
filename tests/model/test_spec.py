"""The spec: published counts, the built model, FLOPs, and configurations that make no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import megatrain
from megatrain.config import ModelConfig, Norm, RopeScaling
from megatrain.errors import InputError
from megatrain.model import spec
from megatrain.model.transformer import Transformer

PRESETS = Path(megatrain.__file__).parent / "conf" / "model"

PUBLISHED = {
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
    "gpt_125m": 123_551_232,
    "tiny": 5_245_184,
}

SMALL = ModelConfig(
    name="small", vocab_size=11, hidden_size=8, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=12
)


def preset(name: str) -> ModelConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(PRESETS / name)))
    assert isinstance(config, ModelConfig)
    return config


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_have_their_published_counts(path: Path) -> None:
    config = preset(path.name)
    spec.check(config)
    assert config.name == path.stem
    assert spec.parameter_count(config) == PUBLISHED[path.stem]


@pytest.mark.parametrize(
    "config",
    [
        preset("llama3_70b.yaml"),
        preset("llama_1b.yaml"),
        replace(SMALL, norm=Norm.layer, attention_bias=True, mlp_bias=True),
        replace(SMALL, qk_norm=True, head_dim=6, tie_embeddings=True),
        replace(SMALL, attention_bias=True, attention_out_bias=False),
    ],
    ids=["llama3_70b", "tied", "layer norm and biases", "qk-norm and head_dim", "biases of q, k, v alone"],
)
def test_the_built_model_has_the_parameters_of_the_spec(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert built == [(parameter.name, parameter.shape) for parameter in spec.parameters(config)]
    assert list(model.buffers()) == []
    assert model.head.weight is model.embedding.weight or not config.tie_embeddings


def test_kinds_and_standard_deviations() -> None:
    config = replace(SMALL, norm=Norm.layer, attention_bias=True, initializer_std=0.1)
    found = {parameter.name: (parameter.kind, parameter.std) for parameter in spec.parameters(config)}
    assert found["embedding.weight"] == (spec.Kind.embedding, 0.1)
    assert found["layers.1.attention.qkv.weight"] == (spec.Kind.matrix, 0.1)
    assert found["layers.1.attention.qkv.bias"] == (spec.Kind.bias, 0.0)
    assert found["layers.1.attention_norm.weight"] == (spec.Kind.norm, 0.0)
    assert found["layers.1.attention_norm.bias"] == (spec.Kind.bias, 0.0)
    assert found["layers.1.attention.out.weight"] == found["layers.1.mlp.down.weight"] == (spec.Kind.matrix, 0.05)
    assert found["head.weight"] == (spec.Kind.matrix, 0.1)


def test_flops_are_those_of_every_product() -> None:
    per_layer = 2 * (8 * 16 + 8 * 8 + 8 * 24 + 12 * 8)
    products = 2 * per_layer + 2 * 8 * 11
    scores_and_values = 2 * 2 * 2 * 8
    assert spec.flops_per_token(SMALL, 5) == products + scores_and_values * (1 + 2 + 3 + 4 + 5) / 5
    windowed = replace(SMALL, sliding_window=2, tie_embeddings=True)
    assert spec.flops_per_token(windowed, 5) == products + scores_and_values * (1 + 2 + 2 + 2 + 2) / 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SMALL, num_kv_heads=3), "model.num_kv_heads=3: has to divide model.num_heads=4"),
        (replace(SMALL, hidden_size=10), "model.num_heads=4: has to divide model.hidden_size=10"),
        (replace(SMALL, head_dim=5), "model.head_dim=5: has to be even"),
        (replace(SMALL, hidden_size=12), "model.head_dim=3: has to be even"),
        (replace(SMALL, num_layers=0), "model.num_layers=0: has to be above 0"),
        (replace(SMALL, attention_out_bias=True), "model.attention_out_bias=true: only with model.attention_bias=true"),
        (replace(SMALL, sliding_window=0), "model.sliding_window=0: has to be above 0"),
        (replace(SMALL, rope_scaling=RopeScaling(factor=0.0)), "model.rope_scaling.factor=0.0: has to be above 0"),
        (
            replace(SMALL, rope_scaling=RopeScaling(high_frequency_factor=1.0)),
            "model.rope_scaling.high_frequency_factor=1.0: has to be above model.rope_scaling.low_frequency_factor=1.0",
        ),
    ],
)
def test_what_makes_no_model_is_named(config: ModelConfig, message: str) -> None:
    with pytest.raises(InputError) as raised:
        spec.check(config)
    assert str(raised.value).startswith(message)
