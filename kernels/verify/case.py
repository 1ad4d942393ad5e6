"""What a kernel's folder says of itself in its verify.py, so that the tools of this folder can check it.

A verify.py has four functions: `cases(generator)` yields the calls whose numbers are checked in the interpreter,
`random_case(draw, size)` makes one of those that are checked on a GPU, `compilations(target)` yields what is compiled
ahead of time, `passes(shape, target, processors)` what its launches move and compute. This file needs no triton.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from random import Random
from typing import Protocol, cast

import torch
from torch import Generator, Tensor

FP32_TERMS = 768
"""What fp32 may add one after the other: the error grows as the square root, and with more is no longer below 1e-6."""

DTYPES = (torch.float32, torch.bfloat16)

KERNELS = ("attention", "linear_cross_entropy", "norm", "rotary", "swiglu")
"""The folders of kernels that have a verify.py."""

INTERPRETER = "interpreter"
"""The target that stands for triton's interpreter."""


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


@dataclass(frozen=True)
class Shape:
    """What a model gives its kernels: `batch` x `length` tokens. Activations are bf16, what else there is fp32.

    heads: of queries, on `kv_heads` key-value heads. intermediate: the width of the MLP.
    """

    batch: int
    length: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return self.batch * self.length


LLAMA_7B = Shape(
    batch=1, length=4096, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocabulary=32000
)


@dataclass(frozen=True)
class Work:
    """What launches do, all programs together; bytes of what masks let through.

    read, written: bytes of the elements read and of those written. again: bytes that are read once more, by another
    program or a later turn of a loop, which is what caches are for. products: FLOPs of matrix products, of padding too.
    exponentials: how many are taken, of masked elements too.
    """

    read: int = 0
    again: int = 0
    written: int = 0
    products: int = 0
    exponentials: int = 0

    @property
    def moved(self) -> int:
        """Bytes between memory and the GPU."""
        return self.read + self.written

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Launch:
    """A kernel's launches in one pass over a shape.

    name: which. compilation: the name of the Compilation that runs; None: PyTorch's own kernel, known by its work
    alone. programs: of all launches. once, turns: how often a program's instructions are issued, summed over programs:
    those of its shortest loop (compiler.Resources) `turns` times, all others at most `once` times.
    """

    name: str
    work: Work
    compilation: str | None = None
    programs: int = 0
    once: int = 0
    turns: int = 0


@dataclass(frozen=True)
class Pass:
    """An operation, forward or backward.

    least: what has to be done: each input read once, each output written once, and the products of what the mask lets
    through. launches: what is done.
    """

    name: str
    least: Work
    launches: tuple[Launch, ...]

    @property
    def work(self) -> Work:
        """Of all launches."""
        return sum((launch.work for launch in self.launches), Work())


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

    def passes(self, shape: Shape, target: str, processors: int) -> Iterator[Pass]:
        """What its launches do for a target, or INTERPRETER, with so many multiprocessors."""


def verifiable(kernel: str) -> Verifiable:
    """The verify.py of a kernel."""
    return cast(Verifiable, importlib.import_module(f"megatrain.kernels.{kernel}.verify"))


def size_between(draw: Random, low: int, high: int) -> int:
    """An integer from low to high, of every order of magnitude as likely."""
    return min(high, int(math.exp(draw.uniform(math.log(low), math.log(high + 1)))))


def generator_of(draw: Random) -> Generator:
    """A generator of tensors that `draw` seeds."""
    return Generator().manual_seed(draw.getrandbits(63))
