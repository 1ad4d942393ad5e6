"""A model of ours as one of transformers'."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatrain.checkpoint.huggingface.config import hugging_face_config
from megatrain.checkpoint.huggingface.tensors import assemble, tensors
from megatrain.config import ModelConfig, Precision


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
