"""What a kernel's folder says of itself in its verify.py, so that the tools of this folder can check it.

A verify.py has three functions: `cases(generator)` yields the calls whose numbers are checked in the interpreter,
`random_case(draw, size)` makes one of those that are checked on a GPU, and `compilations(target)` yields what is
compiled ahead of time. This file needs no triton.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Protocol, cast

import torch
from torch import Generator, Tensor

FP32_TERMS = 768
"""What fp32 may add one after the other: the error grows as the square root, and with more is no longer below 1e-6."""

DTYPES = (torch.float32, torch.bfloat16)

KERNELS = ("attention", "linear_cross_entropy", "norm", "rotary", "swiglu")
"""The folders of kernels that have a verify.py."""


@dataclass(frozen=True)
class Case:
    """One call of an operation, and the same in plain torch.

    operation, reference: functions of the same inputs, by position, that give the same outputs. The reference follows
        the dtype of its inputs, so that it is the truth in fp64, and in bf16 what the kernel has to be as good as.
    inputs: by name; of those whose dtype is floating, gradients are compared too, but for the names in `constant`.
    shared: how many elements of a result have one rounding error in common, which then averages out less.
    """

    name: str
    operation: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    inputs: Mapping[str, Tensor]
    constant: frozenset[str] = frozenset()
    shared: int = 1

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The inputs whose gradients are compared."""
        floating = (name for name, tensor in self.inputs.items() if tensor.is_floating_point())
        return tuple(name for name in floating if name not in self.constant)


@dataclass(frozen=True)
class Compilation:
    """One kernel with one choice of tiles, compiled for a target.

    name: says which, and is the key of its budget. function: the jitted function, as "module:name". types: of each
    argument that isn't a constant, in triton's words ("*bf16", "i32", "fp32"), several for a tuple. constants: the
    constexprs. divisible: integer arguments (all of a tuple's) that are multiples of 16, as strides and sizes of real
    models are; pointers always count as such.
    wide_addresses: what AMD's backend compiles where a tensor has 2 GiB or more; smaller ones get offsets of 32 bits.
    instructions: what has to be there, in the words of targets.py. loop_cycles: for how long one turn of its shortest
    loop with matrix products keeps the matrix units of a multiprocessor busy, which its instructions may not take
    longer than to issue; None: not looked at.
    """

    name: str
    function: str
    types: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, int | float | bool | str | None]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    wide_addresses: bool = False
    instructions: tuple[str, ...] = ()
    loop_cycles: int | None = None


class Verifiable(Protocol):
    """A kernel's verify.py."""

    def cases(self, generator: Generator) -> Iterator[Case]:
        """Calls with inputs drawn from `generator`, of every dtype and option."""

    def random_case(self, draw: Random, size: int) -> Case:
        """A call of any shape, dtype and options, by `draw`, whose largest tensor has about `size` elements at most.

        In fp32 no sum has more than FP32_TERMS terms that a GPU adds one after the other.
        """

    def compilations(self, target: str) -> Iterator[Compilation]:
        """What is compiled for a target, "sm_90"."""


def verifiable(kernel: str) -> Verifiable:
    """The verify.py of a kernel."""
    return cast(Verifiable, importlib.import_module(f"megatrain.kernels.{kernel}.verify"))


def size_between(draw: Random, low: int, high: int) -> int:
    """An integer from low to high, of every order of magnitude as likely."""
    return min(high, int(math.exp(draw.uniform(math.log(low), math.log(high + 1)))))


def generator_of(draw: Random) -> Generator:
    """A generator of tensors that `draw` seeds."""
    return Generator().manual_seed(draw.getrandbits(63))
