"""Rotary positions (Su et al. 2021), with Llama 3's stretching of frequencies.

Design choices:
- Cosines and sines are computed from the positions once a forward and handed to every layer: no buffer to shard, move
  or save, and any positions are legal (packed documents start again at 0).
- Pair i of a head is its elements (i, i + head_dim/2), as in Hugging Face's checkpoints, not the paper's (2i, 2i+1).
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.model.modules import at_least_fp32
from megatrain.model.spec import head_dim


def frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per position of each pair, [head_dim / 2]."""
    size = head_dim(config)
    result = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=dtype, device=device) / size)
    scaling = config.rope_scaling
    if scaling is None:
        return result
    # 0 where the original context holds few turns (stretch), 1 where it holds many (leave alone), linear between.
    turns = scaling.original_context * result / (2 * pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * result / scaling.factor + kept * result


def cos_sin(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [B, S, 1, head_dim / 2] each, from int32[B, S]."""
    angles = positions[..., None, None].to(dtype) * frequencies(config, dtype, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs of x [B, S, heads, head_dim] by their positions' angles, in fp32 or fp64; keeps x's dtype."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
