"""config.json of a Hugging Face folder, in both directions: what it calls our model, and which of our models it means.

Design choices:
- The architecture is the oldest that expresses the model (Llama, Mistral, Qwen2, Qwen3), which most programs can read.
- What is written has the keys of the published models (rope_theta, rope_scaling, torch_dtype): every version of
  transformers and the inference servers read those; what its newest version writes (rope_parameters) is another model
  to an older one. Both are read.
- No torch: a run that begins with such a folder is checked before any rank starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.huggingface.keys import Keys, read_json
from megatrain.config import ModelConfig, Norm, Precision, RopeScaling
from megatrain.errors import InputError, bad_value
from megatrain.model.spec import attention_out_bias, check, head_dim

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

TORCH_DTYPES = {Precision.bf16: "bfloat16", Precision.fp32: "float32", Precision.fp64: "float64"}
"""What weights are written in, as config.json says it."""

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""By model_type."""

_WINDOWED = {"sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "max_window_layers": 28, **_WINDOWED}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, **_WINDOWED},
    "qwen2": _QWEN,
    "qwen3": {"head_dim": 128, **_QWEN},
}
"""What transformers takes an absent key for, where that depends on model_type."""


@dataclass(frozen=True)
class Description:
    """What a Hugging Face folder says of its model.

    sequence_length: the longest it is made for, in tokens. eos_id: the id that ends a document.
    """

    model: ModelConfig
    sequence_length: int
    eos_id: int


def hugging_face_config(config: ModelConfig, precision: Precision, sequence_length: int, eos_id: int) -> dict[str, Any]:
    """The content of config.json. Raises InputError, naming the key, where no architecture expresses the model."""
    architecture = architecture_of(config)
    result: dict[str, Any] = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "torch_dtype": TORCH_DTYPES[precision],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": head_dim(config),
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": config.initializer_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }
    if (scaling := config.rope_scaling) is not None:
        result["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if architecture in ("Llama", "Qwen3"):
        result["attention_bias"] = config.attention_bias
    if architecture == "Llama":
        result["mlp_bias"] = config.mlp_bias
    else:
        result["sliding_window"] = config.sliding_window
    if architecture in ("Qwen2", "Qwen3"):
        # Layers from max_window_layers on have the window.
        result |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return result


def architecture_of(config: ModelConfig) -> str:
    """Llama, Mistral, Qwen2 or Qwen3. Raises InputError, naming the key, for a model that none of them expresses."""
    if config.norm != Norm.rms:
        raise bad_value("model.norm", config.norm.value, "Hugging Face's Llama, Mistral and Qwen have only rms")
    without_out_bias = config.attention_bias and not attention_out_bias(config)
    if config.qk_norm or without_out_bias:
        if config.mlp_bias:
            together = "qk_norm" if config.qk_norm else "attention_out_bias=false"
            raise bad_value("model.mlp_bias", True, f"no Hugging Face architecture has it together with {together}")
        if config.qk_norm and without_out_bias:
            legal = "Hugging Face's Qwen3, for qk_norm, has it as attention_bias"
            raise bad_value("model.attention_out_bias", False, legal)
        return "Qwen3" if config.qk_norm else "Qwen2"
    if config.sliding_window is not None:
        for key in ("attention_bias", "mlp_bias"):
            if getattr(config, key):
                raise bad_value(f"model.{key}", True, "Hugging Face's Mistral, for sliding_window, has no such biases")
        return "Mistral"
    if config.hidden_size % config.num_heads:
        legal = f"has to divide model.hidden_size={config.hidden_size} for Hugging Face's Llama"
        raise bad_value("model.num_heads", config.num_heads, legal)
    return "Llama"


def is_hugging_face(folder: Path) -> bool:
    """Whether the folder is one of Hugging Face's."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> Description:
    """What the folder's config.json describes. Raises InputError naming the key that our model can't express."""
    path = folder / CONFIG
    loaded = read_json(path)
    kind = str(loaded.get("model_type"))
    if kind not in ARCHITECTURES:
        raise bad_value(f"{path}: model_type", kind, f"legal: {', '.join(ARCHITECTURES)}")
    architecture = f"{ARCHITECTURES[kind]}ForCausalLM"
    if (given := loaded.get("architectures")) not in (None, [architecture]):
        raise bad_value(f"{path}: architectures", json.dumps(given), f"legal: {json.dumps([architecture])}")
    keys = Keys(path, {**DEFAULTS[kind], **loaded})
    sequence_length = keys.integer("max_position_embeddings")
    if sequence_length < 1:
        raise keys.error("max_position_embeddings", sequence_length, "has to be above 0")
    model = _model(keys, kind, folder.absolute().name, sequence_length)
    eos = keys.pop("eos_token_id")
    keys.check_rest()
    try:
        check(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Description(model, sequence_length, _eos_id(folder, eos, model.vocab_size))


def _model(keys: Keys, kind: str, name: str, sequence_length: int) -> ModelConfig:
    heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    layers = keys.integer("num_hidden_layers")
    own_head_dim = keys.integer_or_none("head_dim")
    theta, scaling = _rope(keys, sequence_length)
    return ModelConfig(
        name=name,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=None if own_head_dim is None or own_head_dim * heads == hidden else own_head_dim,
        intermediate_size=keys.integer("intermediate_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_window(keys, kind, layers),
        tie_embeddings=keys.switch("tie_word_embeddings"),
        attention_bias=kind == "qwen2" or (kind != "mistral" and keys.switch("attention_bias")),
        attention_out_bias=False if kind == "qwen2" else None,
        mlp_bias=kind == "llama" and keys.switch("mlp_bias"),
        qk_norm=kind == "qwen3",
        initializer_std=keys.number("initializer_range", 0.02),
    )


def _rope(keys: Keys, sequence_length: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies: `rope_parameters` of transformers 5, or what was before."""
    new, old = keys.pop("rope_parameters"), keys.pop("rope_scaling")
    if new and old and new != old:
        raise keys.error("rope_scaling", old, "differs from rope_parameters; legal: one of them")
    key, given = ("rope_parameters", new) if new else ("rope_scaling", old)
    if not isinstance(given or {}, dict):
        raise keys.error(key, given, "an object is needed")
    inner = Keys(keys.path, given or {}, f"{key}.")
    theta = inner.number("rope_theta", keys.number("rope_theta", 10000.0))
    older = inner.pop("type")
    kind = inner.pop("rope_type") or older or "default"
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=inner.number("factor"),
            low_frequency_factor=inner.number("low_freq_factor"),
            high_frequency_factor=inner.number("high_freq_factor"),
            original_context=inner.integer("original_max_position_embeddings", sequence_length),
        )
    elif kind != "default":
        raise inner.error("rope_type", kind, "legal: default, llama3")
    inner.check_rest()
    return theta, scaling


def _window(keys: Keys, kind: str, layers: int) -> int | None:
    """The window of every layer. Raises InputError where only some layers have one."""
    if kind == "llama":
        return None
    window = keys.integer_or_none("sliding_window")
    if kind == "mistral":
        return window
    used = keys.switch("use_sliding_window")
    first = keys.integer("max_window_layers")
    types = keys.pop("layer_types")
    if types is not None:
        if types == ["full_attention"] * layers:
            return None
        if not used or window is None or types != ["sliding_attention"] * layers:
            legal = "legal: full_attention in all layers; sliding_attention in all with use_sliding_window=true"
            raise keys.error("layer_types", types, legal)
        return window
    if not used or window is None or first >= layers:
        return None
    if first > 0:
        legal = f"the layers before it would have no window; legal: 0, or {layers} or more"
        raise keys.error("max_window_layers", first, legal)
    return window


def _eos_id(folder: Path, given: Any, vocab_size: int) -> int:
    """The id that ends a document: eos_token_id, the first where there are several."""
    path = folder / CONFIG
    if given is None and (folder / GENERATION_CONFIG).is_file():
        path = folder / GENERATION_CONFIG
        given = read_json(path).get("eos_token_id")
    first = given[0] if isinstance(given, list) and given else given
    if type(first) is not int or not 0 <= first < vocab_size:
        raise bad_value(f"{path}: eos_token_id", json.dumps(given), f"an id below vocab_size={vocab_size} is needed")
    return first
