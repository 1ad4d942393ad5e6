"""The layers that benchmarks/block.py counts: each as its project builds it, of one shape, with weights in bf16.

Design choices:
- All are run eagerly. What torch.compile would fuse of them depends on its version and isn't counted.
- What every layer of a model shares (rotary tables, masks, positions) is made outside of the layer, as each does.
- transformers gets no mask, so its attention is F.scaled_dot_product_attention(is_causal=True).
- torchtitan's is the block of its Llama 3: projections of queries, keys and values in one, rotary positions by complex
  numbers, and attention over variable lengths, of one document. It has FlexAttention too, which has to be compiled;
  PyTorch's scaled_dot_product_attention it doesn't let language models use.
- torchtitan is no dependency of the project. It and what it imports lie in a folder of their own:
  `pip install --no-deps --target DIR torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 docstring_parser==0.18.0`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from megatrain.config import AttentionKernel, Kernel, KernelsConfig, LossKernel, ModelConfig
from megatrain.kernels.attention import op, packed, sdpa
from megatrain.model import choice
from megatrain.model.rotary import cos_sin
from megatrain.model.spec import head_dim
from megatrain.model.transformer import Layer
from megatrain.parallel.tensor import ALONE

DTYPE = torch.bfloat16
TRITON = KernelsConfig(AttentionKernel.triton, Kernel.triton, Kernel.triton, Kernel.triton, LossKernel.triton)


@dataclass(frozen=True)
class Block:
    """A layer. forward: [1, S, hidden_size] from the same. shared: tensors that all layers of a model are given."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    shared: Sequence[Tensor]


Make = Callable[[ModelConfig, int], Block]
"""Of a model and a sequence length."""


def ours(kernels: KernelsConfig, config: ModelConfig, length: int) -> Block:
    """The project's own."""
    module = _cast(Layer(config, ALONE, kernels, recompute=False))
    positions = torch.arange(length, dtype=torch.int32)[None]
    cos, sin = cos_sin(config, positions, torch.float32)
    start, end = torch.zeros_like(positions), positions + 1
    mask: packed.Mask
    if kernels.attention is AttentionKernel.triton:
        mask = op.intervals(start, end, length)
    else:
        mask = sdpa.prepare(start, end, length)
    return Block(module, lambda x: module(x, cos, sin, mask), [cos, sin, *vars(mask).values()])


def transformers(config: ModelConfig, length: int) -> Block:
    """LlamaDecoderLayer."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    its_config = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        attn_implementation="sdpa",
    )
    module = _cast(LlamaDecoderLayer(its_config, layer_idx=0))
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(its_config)(torch.empty(0, dtype=DTYPE), positions)
    return Block(module, lambda x: module(x, position_embeddings=(cos, sin)), [cos, sin])


def torchtitan(config: ModelConfig, length: int) -> Block:
    """Llama3TransformerBlock."""
    from torchtitan.models.common import ComplexRoPE, RMSNorm
    from torchtitan.models.common.attention import VarlenMetadata
    from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3TransformerBlock

    attention = make_gqa_config(
        dim=config.hidden_size,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        wqkv_param_init={},
        wo_param_init={},
        inner_attention=get_attention_config("varlen"),
        fuse_qkv=True,
        rope=ComplexRoPE.Config(dim=head_dim(config), max_seq_len=length),
    )
    norm = RMSNorm.Config(normalized_shape=config.hidden_size)
    its_config = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=attention,
        feed_forward=make_ffn_config(
            dim=config.hidden_size, hidden_dim=config.intermediate_size, w1_param_init={}, w2w3_param_init={}
        ),
    )
    module = _cast(its_config.build())
    positions = torch.arange(length, dtype=torch.int32)[None]
    documents = torch.tensor([0, length], dtype=torch.int32)
    mask = VarlenMetadata(documents, documents, length, length)
    return Block(module, lambda x: module(x, mask, positions), [positions, documents, *module.buffers()])


def _cast(module: nn.Module) -> nn.Module:
    """With its parameters in bf16, its buffers as they are: torchtitan's rotary table is complex."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPE)
    return module


OURS, TRANSFORMERS, TORCHTITAN = "megatrain, triton", "transformers, sdpa", "torchtitan"


def contenders(peers: str) -> dict[str, Make]:
    """All that there are. peers: the folder that torchtitan may be in."""
    found: dict[str, Make] = {
        OURS: partial(ours, TRITON),
        "megatrain, torch": partial(ours, choice.TORCH),
        TRANSFORMERS: transformers,
    }
    sys.path.append(peers)
    if find_spec("torchtitan") is None:
        print(f"{TORCHTITAN}: left out, {peers} doesn't have it (see benchmarks/block_peers.py)")
    else:
        found[TORCHTITAN] = torchtitan
    return found
