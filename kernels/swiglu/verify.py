"""The SwiGLU kernels for kernels/verify: what is run in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Generator

from megatrain.kernels.swiglu import configs, op, reference
from megatrain.kernels.verify.case import (
    DTYPES,
    Case,
    Compilation,
    Launch,
    Pass,
    Shape,
    Work,
    generator_of,
    size_between,
)
from megatrain.kernels.verify.targets import TARGETS, WIDE_LOAD, WIDE_STORE


def case(generator: Generator, rows: int, width: int, dtype: torch.dtype) -> Case:
    """SwiGLU of [2, rows, 2 * width]."""
    return Case(
        name=f"2x{rows}x{width}, {dtype}",
        operation=lambda gate_up: (op.swiglu(gate_up),),
        reference=lambda gate_up: (reference.swiglu(gate_up),),
        inputs={"gate_up": (3 * torch.randn(2, rows, 2 * width, generator=generator)).to(dtype)},
    )


def cases(generator: Generator) -> Iterator[Case]:
    """Widths within a block, at its edge and beyond, in both dtypes."""
    for width in (1, 88, configs.BLOCK, configs.BLOCK + 8):
        for dtype in (torch.float32, torch.bfloat16):
            yield case(generator, 3, width, dtype)


def random_case(draw: Random, size: int) -> Case:
    """Any number of rows of any width, the last block of which is whole or not."""
    width = size_between(draw, 1, min(20_000, size // 4))
    rows = size_between(draw, 1, size // (4 * width))
    return case(generator_of(draw), rows, width, draw.choice(DTYPES))


def compilations(target: str) -> Iterator[Compilation]:
    """Both in bf16."""
    for kernel in ("forward", "backward"):
        yield Compilation(
            name=f"swiglu {kernel}",
            function=f"megatrain.kernels.swiglu.kernel:{kernel}",
            types=dict.fromkeys(("gate_up", "y", "dy", "dgate_up"), "*bf16") | {"width": "i32"},
            constants={"BLOCK": configs.BLOCK},
            divisible=("width",),
            num_warps=TARGETS[target].warps(configs.THREADS),
            instructions=(WIDE_LOAD, WIDE_STORE),
        )


def passes(shape: Shape, target: str, processors: int) -> Iterator[Pass]:  # noqa: ARG001
    """A program for each row and block of its columns; nothing is read again."""
    rows, width = shape.tokens, shape.intermediate
    programs = rows * -(-width // configs.BLOCK)
    for kernel, tensors_in, tensors_out in (("forward", 2, 1), ("backward", 3, 3)):
        least = Work(read=tensors_in * 2 * rows * width, written=tensors_out * 2 * rows * width)
        work = least + Work(exponentials=programs * configs.BLOCK)
        yield Pass(f"swiglu {kernel}", least, (Launch(kernel, work, f"swiglu {kernel}", programs, once=programs),))
