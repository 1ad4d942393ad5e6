"""Models of every architecture that Hugging Face and we have in common, and a model of ours as one of transformers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatrain.checkpoint.huggingface.config import hugging_face_config
from megatrain.checkpoint.huggingface.tensors import assemble, tensors
from megatrain.config import ModelConfig, Precision, RopeScaling

LLAMA = ModelConfig(
    name="model",
    vocab_size=300,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=96,
    rope_theta=500.0,
    initializer_std=0.2,
)

MODELS = {
    "Llama": replace(LLAMA, rope_scaling=RopeScaling(original_context=32), tie_embeddings=True),
    "Llama with biases": replace(LLAMA, num_kv_heads=4, attention_bias=True, mlp_bias=True),
    "Mistral": replace(LLAMA, sliding_window=5, head_dim=24, norm_eps=1e-6),
    "Qwen2": replace(LLAMA, attention_bias=True, attention_out_bias=False, num_kv_heads=1),
    "Qwen2 with window": replace(LLAMA, attention_bias=True, attention_out_bias=False, sliding_window=7),
    "Qwen3": replace(LLAMA, qk_norm=True, head_dim=24, tie_embeddings=True),
    "Qwen3 with window": replace(LLAMA, qk_norm=True, attention_bias=True, sliding_window=7),
}
"""By architecture."""


class ModuleReader:
    """The parameters of a module, as a ShardReader."""

    optimizer_step = 0

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        assert state == "master"
        return self._parameters[name].detach().view(-1)[start:stop]


def counterpart(config: ModelConfig, model: nn.Module, sequence_length: int) -> Any:
    """The model of transformers with the weights of ours, in memory."""
    hf_config = transformers.AutoConfig.for_model(
        **hugging_face_config(config, Precision.fp32, sequence_length, eos_id=0)
    )
    result = transformers.AutoModelForCausalLM.from_config(hf_config)
    reader = ModuleReader(model)
    weights = {tensor.name: assemble(reader, tensor, torch.float32) for tensor in tensors(config)}
    missing, unexpected = result.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return result.eval()
