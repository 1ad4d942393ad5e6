"""transformers for tests, and a model of ours as one of theirs."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from megatrain.checkpoint.huggingface import hugging_face_config, to_hugging_face
from megatrain.config import ModelConfig, Precision


def transformers() -> Any:
    """The package. It looks for one called `kernels`, and must not take this repository's folder for it."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    import transformers

    return transformers


def counterpart(config: ModelConfig, model: nn.Module, sequence_length: int) -> Any:
    """The model of transformers with the weights of ours, in memory."""
    hf = transformers()
    hf_config = hf.AutoConfig.for_model(**hugging_face_config(config, Precision.fp32, sequence_length, eos_id=0))
    result = hf.AutoModelForCausalLM.from_config(hf_config)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weights |= to_hugging_face(config, name, parameter.detach())
    missing, unexpected = result.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return result.eval()
