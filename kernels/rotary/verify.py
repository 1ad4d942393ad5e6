"""The rotary kernel for kernels/verify: what is run in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Generator

from megatrain.kernels.rotary import configs, op, reference
from megatrain.kernels.verify.case import DTYPES, Case, Compilation, generator_of, size_between
from megatrain.kernels.verify.targets import TARGETS, WIDE_LOAD, WIDE_STORE


def case(
    generator: Generator, groups: int, group: int, rotated: int, half: int, dtype: torch.dtype, positions: int = 3
) -> Case:
    """Two samples, with `groups` groups of heads."""
    angles = 100 * torch.rand(2, positions, 1, half, generator=generator)
    x = torch.randn(2, positions, groups * group * 2 * half, generator=generator).to(dtype)
    return Case(
        name=f"{positions} positions, {rotated} of {group} heads in {groups} groups, {2 * half}, {dtype}",
        # A copy, for inputs mustn't change: they are used again.
        operation=lambda x, cos, sin: (op.rotate_(x.clone(), cos, sin, group, rotated),),
        reference=lambda x, cos, sin: (reference.rotate(x, cos, sin, group, rotated),),
        inputs={"x": x, "cos": angles.cos(), "sin": angles.sin()},
        constant=frozenset({"cos", "sin"}),
    )


def cases(generator: Generator) -> Iterator[Case]:
    """Packed and separate heads, of dimensions that are and aren't powers of 2, in both dtypes."""
    for groups, group, rotated in ((5, 1, 1), (2, 6, 5), (9, 3, 2)):
        for half in (1, 20, 64):
            for dtype in (torch.float32, torch.bfloat16):
                yield case(generator, groups, group, rotated, half, dtype)


def random_case(draw: Random, size: int) -> Case:
    """Projections of any form, of any number of positions."""
    group, rotated = draw.choice(((1, 1), (3, 2), (6, 5), (10, 9), (4, 1)))
    half = draw.choice((1, 8, 20, 32, 40, 64, 128))
    groups = size_between(draw, 1, max(1, min(64, size // (4 * group * half))))
    positions = size_between(draw, 1, max(1, size // (4 * groups * group * half)))
    return case(generator_of(draw), groups, group, rotated, half, draw.choice(DTYPES), positions)


def compilations(target: str) -> Iterator[Compilation]:
    """Both ways in bf16, of packed projections with a query and with four queries a key."""
    for half, group in ((64, 3), (64, 6), (32, 6)):
        per_program, block = configs.tile(half)
        for backward in (False, True):
            yield Compilation(
                name=f"rotary {2 * half}, {group - 1} of {group} {'backward' if backward else 'forward'}",
                function="megatrain.kernels.rotary.kernel:rotate",
                types={"x": "*bf16", "y": "*bf16", "cos": "*fp32", "sin": "*fp32", "heads": "i32"},
                constants={
                    "GROUP": group,
                    "ROTATED": group - 1,
                    "HALF": half,
                    "BACKWARD": backward,
                    "HEADS": per_program,
                    "BLOCK": block,
                },
                num_warps=TARGETS[target].warps(configs.THREADS),
                instructions=(WIDE_LOAD, WIDE_STORE),
            )
