"""Which tensors a Hugging Face model has, and where each lies in our parameters: one table for both directions.

Design choices:
- A tensor is a few ranges of rows of one of our parameters, or their transpose: fused projections are rows put together
  (law 1 wants tensor parallelism to cut dimension 0), row-parallel weights are stored [in, out].
- The table has names and numbers and no bytes, so export plans its files and import checks a folder's before reading.
- Rows are copied in blocks: what is in memory at once is one tensor as it is written, and a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.engines.ranges import MASTER, ShardReader
from megatrain.model.spec import ParameterSpec, head_dim, parameters

BLOCK_ELEMENTS = 1 << 24
"""Elements of a parameter that are read at once (64 MiB in fp32)."""

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
}
_TRANSPOSED = ("attention.out", "mlp.down")

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of a Hugging Face model.

    parameter: ours that it is part of. rows: (start, stop) in that one's dimension 0, which are in this order the rows
    of the tensor; where it is transposed, its columns.
    """

    name: str
    parameter: ParameterSpec
    rows: Rows
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it."""
        shape = (sum(stop - start for start, stop in self.rows), *self.parameter.shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


def tensors(config: ModelConfig) -> tuple[HuggingFaceTensor, ...]:
    """Every tensor of the model, in the order of our parameters; a tied head isn't listed."""
    return tuple(tensor for parameter in parameters(config) for tensor in _tensors_of(config, parameter))


def _tensors_of(config: ModelConfig, parameter: ParameterSpec) -> Iterator[HuggingFaceTensor]:
    module, _, end = parameter.name.rpartition(".")
    rows = parameter.shape[0]
    if module in _TOP:
        yield HuggingFaceTensor(f"{_TOP[module]}.{end}", parameter, ((0, rows),))
        return
    _, number, module = module.split(".", 2)
    prefix = f"model.layers.{number}"
    if module in _LAYER:
        transposed = module in _TRANSPOSED and end == "weight"
        yield HuggingFaceTensor(f"{prefix}.{_LAYER[module]}.{end}", parameter, ((0, rows),), transposed)
    elif module == "mlp.gate_up":
        yield HuggingFaceTensor(f"{prefix}.mlp.gate_proj.{end}", parameter, ((0, rows // 2),))
        yield HuggingFaceTensor(f"{prefix}.mlp.up_proj.{end}", parameter, ((rows // 2, rows),))
    else:
        for letter, part in zip("qkv", _of_groups(config), strict=True):
            yield HuggingFaceTensor(f"{prefix}.self_attn.{letter}_proj.{end}", parameter, part)


def _of_groups(config: ModelConfig) -> tuple[Rows, Rows, Rows]:
    """The rows of queries, keys and values: each group of qkv has its query heads, its key, its value."""
    head, queries = head_dim(config), config.num_heads // config.num_kv_heads
    groups = [i * (queries + 2) * head for i in range(config.num_kv_heads)]
    bounds = (0, queries * head, (queries + 1) * head, (queries + 2) * head)
    query, key, value = (tuple((group + start, group + stop) for group in groups) for start, stop in pairwise(bounds))
    return query, key, value


def assemble(reader: ShardReader, tensor: HuggingFaceTensor, dtype: torch.dtype) -> Tensor:
    """The tensor in its shape and in `dtype`, on the CPU, contiguous, from the masters that `reader` has."""
    result = torch.empty(tensor.shape, dtype=dtype)
    target = result.t() if tensor.transposed else result
    width = tensor.parameter.size // tensor.parameter.shape[0]
    step = max(1, BLOCK_ELEMENTS // width)
    position = 0
    for start, stop in tensor.rows:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = target[position : position + last - first]
            block.copy_(reader.read(MASTER, tensor.parameter.name, first * width, last * width).view(block.shape))
            position += last - first
    return result
