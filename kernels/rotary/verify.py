"""The rotary kernel for kernels/verify: what is run in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Generator

from megatrain.kernels.rotary import configs, op, reference
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


def _name(half: int, group: int, backward: bool) -> str:
    return f"rotary {2 * half}, {group - 1} of {group} {'backward' if backward else 'forward'}"


def compilations(target: str) -> Iterator[Compilation]:
    """Both ways in bf16, of packed projections with a query and with four queries a key."""
    for half, group in ((64, 3), (64, 6), (32, 6)):
        per_program, block = configs.tile(half)
        for backward in (False, True):
            yield Compilation(
                name=_name(half, group, backward),
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


def passes(shape: Shape, target: str, processors: int) -> Iterator[Pass]:  # noqa: ARG001
    """Of the fused projection: every program of a token reads its angles; backward copies the values too."""
    group, half = shape.heads // shape.kv_heads + 2, shape.head_dim // 2
    heads, angles = shape.kv_heads * group, 2 * 4 * half
    of_token = -(-heads // configs.tile(half)[0])
    programs = shape.tokens * of_token
    for backward in (False, True):
        moved = 2 * shape.head_dim * (heads if backward else heads - shape.kv_heads)
        least = Work(read=shape.tokens * (moved + angles), written=shape.tokens * moved)
        work = least + Work(again=shape.tokens * (of_token - 1) * angles)
        name = "backward" if backward else "forward"
        launch = Launch(name, work, _name(half, group, backward), programs, once=programs)
        yield Pass(f"rotary {name}", least, (launch,))
