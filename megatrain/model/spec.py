"""The shape of a model on paper: its parameters, their counts, its FLOPs; and whether a configuration makes sense.

Design choices:
- No torch: planning, checking a configuration and `megatrain --help` must not wait for it.
- `parameters` is the one list of what a model stores; the built Transformer is tested against it. Names are global, so
  a layer is called the same in every layout.
- Dimension 0 is what tensor parallelism shards (law 1). Column-parallel weights are [out, in], row-parallel ones
  (attention.out, mlp.down) [in, out]. qkv has a group of rows for each key-value head: its query heads, then its key,
  its value. gate_up has the gate first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from megatrain.config import ModelConfig, Norm
from megatrain.errors import bad_value


class Kind(Enum):
    """What a parameter is, for decay groups and initial values."""

    embedding = "embedding"
    norm = "norm"
    bias = "bias"
    matrix = "matrix"


class Cut(Enum):
    """How tensor parallelism cuts dimension 0: not at all, even rows, rows of each half, groups of key-value heads."""

    none = "none"
    rows = "rows"
    halves = "halves"
    heads = "heads"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as it is stored; std is the standard deviation of its initial values (0: not random)."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    std: float = 0.0
    cut: Cut = Cut.none

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


def head_dim(config: ModelConfig) -> int:
    """The width of an attention head."""
    return config.head_dim if config.head_dim is not None else config.hidden_size // config.num_heads


def attention_out_bias(config: ModelConfig) -> bool:
    """Whether attention's output projection has a bias."""
    return config.attention_bias if config.attention_out_bias is None else config.attention_out_bias


def qkv_size(config: ModelConfig) -> int:
    """Rows of the fused query, key and value projection."""
    return (config.num_heads + 2 * config.num_kv_heads) * head_dim(config)


def parameters(config: ModelConfig) -> tuple[ParameterSpec, ...]:
    """Every parameter, once, in the order of the built model; a tied head is the embedding and isn't listed."""
    return tuple(_parameters(config))


def _parameters(config: ModelConfig) -> Iterator[ParameterSpec]:
    hidden, std = config.hidden_size, config.initializer_std
    # Each layer adds two terms to the residual stream: its variance shall not grow with depth (GPT-2, section 2.3).
    residual_std = std / (2 * config.num_layers) ** 0.5
    qkv, gate_up = qkv_size(config), 2 * config.intermediate_size
    mlp_bias = config.mlp_bias
    yield ParameterSpec("embedding.weight", (config.vocab_size, hidden), Kind.embedding, std, Cut.rows)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        yield from _norm(config, f"{layer}.attention_norm")
        yield from _linear(f"{layer}.attention.qkv", (qkv, hidden), qkv if config.attention_bias else 0, std, Cut.heads)
        if config.qk_norm:
            yield ParameterSpec(f"{layer}.attention.query_norm.weight", (head_dim(config),), Kind.norm)
            yield ParameterSpec(f"{layer}.attention.key_norm.weight", (head_dim(config),), Kind.norm)
        out = (config.num_heads * head_dim(config), hidden)
        out_bias = hidden if attention_out_bias(config) else 0
        yield from _linear(f"{layer}.attention.out", out, out_bias, residual_std, Cut.rows)
        yield from _norm(config, f"{layer}.mlp_norm")
        yield from _linear(f"{layer}.mlp.gate_up", (gate_up, hidden), gate_up if mlp_bias else 0, std, Cut.halves)
        down = (config.intermediate_size, hidden)
        yield from _linear(f"{layer}.mlp.down", down, hidden if mlp_bias else 0, residual_std, Cut.rows)
    yield from _norm(config, "norm")
    if not config.tie_embeddings:
        yield ParameterSpec("head.weight", (config.vocab_size, hidden), Kind.matrix, std, Cut.rows)


def _linear(name: str, shape: tuple[int, int], bias: int, std: float, cut: Cut) -> Iterator[ParameterSpec]:
    """A weight, and a bias of `bias` elements where that isn't 0."""
    yield ParameterSpec(f"{name}.weight", shape, Kind.matrix, std, cut)
    if bias:
        # What is added after a row-parallel product is added once, so each rank holds it whole.
        yield ParameterSpec(f"{name}.bias", (bias,), Kind.bias, cut=Cut.none if cut is Cut.rows else cut)


def _norm(config: ModelConfig, name: str) -> Iterator[ParameterSpec]:
    yield ParameterSpec(f"{name}.weight", (config.hidden_size,), Kind.norm)
    if config.norm == Norm.layer:
        yield ParameterSpec(f"{name}.bias", (config.hidden_size,), Kind.bias)


def parameter_count(config: ModelConfig) -> int:
    """Elements of all parameters; a tied head is counted once."""
    return sum(parameter.size for parameter in parameters(config))


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one forward pass per token; forward and backward together take three times as many.

    2 for each element of a weight that is multiplied (the head included where it is tied, the embedding not: it is a
    lookup), and in each layer 4 x num_heads x head_dim x keys for the scores and the weighted values, where `keys` is
    how many a query sees on average: (S+1)/2, fewer with a sliding window. Norms, rotations, activations and softmax
    aren't counted, nor what is computed under the mask or again (so it is MFU's count, not HFU's; Chowdhery et al.
    2022, appendix B, which doesn't halve the causal part).
    """
    multiplied = sum(parameter.size for parameter in parameters(config) if parameter.kind == Kind.matrix)
    if config.tie_embeddings:
        multiplied += config.vocab_size * config.hidden_size
    window = min(config.sliding_window or sequence_length, sequence_length)
    keys = window - window * (window - 1) / (2 * sequence_length)
    return 2 * multiplied + 4 * config.num_layers * config.num_heads * head_dim(config) * keys


def check(config: ModelConfig) -> None:
    """Raises InputError, naming the key, where the numbers don't make a model."""
    sizes = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"]
    optional = [key for key in ("head_dim", "sliding_window") if getattr(config, key) is not None]
    for key in (*sizes, *optional, "norm_eps", "rope_theta", "initializer_std"):
        if getattr(config, key) <= 0:
            raise bad_value(f"model.{key}", getattr(config, key), "has to be above 0")
    if config.num_heads % config.num_kv_heads:
        raise bad_value("model.num_kv_heads", config.num_kv_heads, f"has to divide model.num_heads={config.num_heads}")
    if config.head_dim is None and config.hidden_size % config.num_heads:
        legal = f"has to divide model.hidden_size={config.hidden_size} where model.head_dim is null"
        raise bad_value("model.num_heads", config.num_heads, legal)
    if head_dim(config) % 2:
        raise bad_value("model.head_dim", head_dim(config), "has to be even: rotary positions turn pairs")
    if config.attention_out_bias and not config.attention_bias:
        legal = "only with model.attention_bias=true; legal: null, false"
        raise bad_value("model.attention_out_bias", "true", legal)
    _check_rope_scaling(config)


def _check_rope_scaling(config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    for key in ("factor", "low_frequency_factor", "original_context"):
        if getattr(scaling, key) <= 0:
            raise bad_value(f"model.rope_scaling.{key}", getattr(scaling, key), "has to be above 0")
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        legal = f"has to be above model.rope_scaling.low_frequency_factor={scaling.low_frequency_factor}"
        raise bad_value("model.rope_scaling.high_frequency_factor", scaling.high_frequency_factor, legal)
