"""Initial weights as a function of (seed, name, element): the same in every layout (law 4).

Design choices:
- Philox (Salmon et al. 2011) counts instead of remembering, so any range is made where it is needed, without what comes
  before it and without the whole parameter. The key is a hash of seed and name, the counter the element's number.
- The normal distribution comes from Box and Muller (1958): a fixed number of random bits an element, which numpy's own
  (rejection) hasn't. One 64-bit word makes two elements, so nothing is farther out than 6.8 standard deviations.
- Values are made in aligned blocks and cut, so that a range has the bits of the whole by construction, not by the grace
  of vectorised loops treating every tail alike.
- It reads like a checkpoint (the ShardReader of engines/ranges.py): a fresh start and a resume are the same code.
"""

from __future__ import annotations

from hashlib import blake2b
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.model.spec import Kind, parameters

BLOCK = 1 << 16
"""Elements made at once: what a read holds besides its result, a few times over."""

_WORDS_PER_COUNT = 4
"""64-bit words that Philox makes of one value of its counter."""


class InitialWeights:
    """The ShardReader of step 0: masters drawn from the configuration's distributions, moments zero."""

    optimizer_step = 0

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._parameters = {parameter.name: parameter for parameter in parameters(config)}
        self._seed = seed

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`: fp32, 1-D, on the CPU.

        state "master": normal(0, std) as spec.parameters has it, 1 for norms, 0 for biases. Any other state: 0.
        """
        parameter = self._parameters[name]
        if state != "master" or parameter.kind == Kind.bias:
            return torch.zeros(stop - start)
        if parameter.kind == Kind.norm:
            return torch.ones(stop - start)
        return torch.from_numpy(normal(self._seed, name, start, stop) * np.float32(parameter.std))


def normal(seed: int, name: str, start: int, stop: int) -> NDArray[np.float32]:
    """Elements [start, stop) of the endless sequence of standard normal numbers that (seed, name) stands for."""
    key = int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
    result = np.empty(stop - start, np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(stop, first + BLOCK)
        result[low - start : high - start] = _block(key, block)[low - first : high - first]
    return result


def _block(key: int, block: int) -> NDArray[np.float32]:
    words = BLOCK // 2
    bits = np.random.Philox(key=key, counter=block * words // _WORDS_PER_COUNT).random_raw(words).view(np.uint32)
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    radius = np.sqrt(np.float32(-2) * np.log(uniform[0::2]))
    angle = np.float32(2 * pi) * uniform[1::2]
    result = np.empty(BLOCK, np.float32)
    result[0::2] = radius * np.cos(angle)
    result[1::2] = radius * np.sin(angle)
    return result
