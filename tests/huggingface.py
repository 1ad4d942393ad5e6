"""A model of ours as one of transformers'."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

from megatrain.checkpoint.huggingface import hugging_face_config, to_hugging_face
from megatrain.config import ModelConfig, Precision


def counterpart(config: ModelConfig, model: nn.Module, sequence_length: int) -> Any:
    """The model of transformers with the weights of ours, in memory."""
    hf_config = transformers.AutoConfig.for_model(
        **hugging_face_config(config, Precision.fp32, sequence_length, eos_id=0)
    )
    result = transformers.AutoModelForCausalLM.from_config(hf_config)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weights |= to_hugging_face(config, name, parameter.detach())
    missing, unexpected = result.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return result.eval()
