"""The norm kernels for kernels/verify: what is run in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

import torch
from torch import Generator, Tensor

from megatrain.kernels.norm import configs, op, reference
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

EPS = 1e-5
WIDTHS = (64, 128, 1024, 4096, 8192, 16384, 32768)
"""Compiled: a head's (of normed queries and keys), models' from tiny to 405B, and tiled ones."""


def case(
    generator: Generator, rows: int, width: int, dtype: torch.dtype, residual: bool, centered: bool, scale: float = 1.0
) -> Case:
    """One norm of [2, rows, width], with weights in fp32, as the model has them. scale: the inputs' deviation."""

    def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    inputs = {"x": random(2, rows, width, dtype=dtype, scale=scale)}
    if residual:
        inputs["residual"] = random(2, rows, width, dtype=dtype, scale=scale)
    inputs["weight"] = random(width)
    if centered:
        inputs["bias"] = random(width)
    return Case(
        name=f"{'layer' if centered else 'rms'}{' + residual' if residual else ''}, 2x{rows}x{width}, {dtype}",
        operation=partial(_call, op.layer_norm if centered else op.rms_norm, residual),
        reference=partial(_call, reference.layer_norm if centered else reference.rms_norm, residual),
        inputs=inputs,
    )


def _call(
    function: Callable[..., tuple[Tensor, Tensor]], residual: bool, x: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    norm, summed = function(x, *rest, EPS) if residual else function(x, None, *rest, EPS)
    return (norm, summed) if residual else (norm,)


def cases(generator: Generator) -> Iterator[Case]:
    """Both norms, with and without a residual, in both dtypes, whole and tiled."""
    for width in (8, 80, 256, 8192 + 40, 16384 + 40):
        for dtype in (torch.float32, torch.bfloat16):
            for residual in (False, True):
                for centered in (False, True):
                    yield case(generator, 5, width, dtype, residual, centered)


def random_case(draw: Random, size: int) -> Case:
    """Either norm of any number of rows of any width, whole and tiled."""
    width = size_between(draw, 8, min(40_000, size // 2))
    rows = size_between(draw, 1, size // (2 * width))
    residual, centered = draw.random() < 0.5, draw.random() < 0.5
    return case(generator_of(draw), rows, width, draw.choice(DTYPES), residual, centered)


def compilations(target: str) -> Iterator[Compilation]:
    """Every kernel in bf16 with weights in fp32: RMSNorm of each width, LayerNorm and no residual of some."""
    for width in WIDTHS:
        yield from _forward_and_backward(target, width, residual=True, centered=False)
    for width in (4096, 32768):
        yield from _forward_and_backward(target, width, residual=True, centered=True)
    yield from _forward_and_backward(target, 4096, residual=False, centered=False)


def _name(width: int, residual: bool, centered: bool) -> str:
    return f"{'layer' if centered else 'rms'}{' + residual' if residual else ''} {width}"


def _forward_and_backward(target: str, width: int, residual: bool, centered: bool) -> Iterator[Compilation]:
    norm = _name(width, residual, centered)
    yield _compilation(target, norm, "forward", width, residual, centered)
    yield _compilation(target, norm, "backward", width, residual, centered)
    if width > configs.backward(width).block:
        yield _compilation(target, norm, "backward_sums", width, residual, centered)


def _compilation(target: str, norm: str, kernel: str, width: int, residual: bool, centered: bool) -> Compilation:
    tile = configs.forward(width) if kernel == "forward" else configs.backward(width)
    whole = width <= tile.block
    function = "forward_tiled" if kernel == "forward" and not whole else kernel
    constants: dict[str, int | bool | None] = {"CENTERED": centered, "BLOCK": tile.block}
    if function in ("forward", "backward"):
        constants["ROWS"] = tile.rows
    if kernel == "forward":
        constants |= {"HAS_RESIDUAL": residual} | ({} if residual else {"residual": None})
        constants |= {} if centered else {"bias": None}
    if kernel == "backward":
        constants |= {"HAS_DSUMMED": residual, "WHOLE": whole} | ({} if residual else {"dsummed": None})
        constants |= {"along_norm": None, "along_mean": None} if whole else {}
        constants |= {} if centered else {"dbias": None}
    bf16 = ("x", "residual", "y", "summed", "dy", "dsummed", "dx")
    fp32 = ("weight", "bias", "mean", "rstd", "along_norm", "along_mean", "dweight", "dbias")
    return Compilation(
        name=f"{norm} {kernel}",
        function=f"megatrain.kernels.norm.kernel:{function}",
        types=dict.fromkeys(bf16, "*bf16")
        | dict.fromkeys(fp32, "*fp32")
        | {"rows": "i32", "width": "i32", "share": "i32", "eps": "fp32"},
        constants=constants,
        divisible=("width",),
        num_warps=TARGETS[target].warps(tile.threads),
        instructions=(WIDE_LOAD, WIDE_STORE) if kernel != "backward_sums" else (WIDE_LOAD,),
    )


def passes(shape: Shape, target: str, processors: int) -> Iterator[Pass]:  # noqa: ARG001
    """RMSNorm with a residual, as a block has it."""
    return norm_passes(shape.tokens, shape.hidden, processors)


def norm_passes(
    rows: int, width: int, processors: int, residual: bool = True, centered: bool = False
) -> Iterator[Pass]:
    """Of rows that a tile holds whole. Raises ValueError for others."""
    if width > configs.backward(width).block:
        raise ValueError(f"norm: rows of {width} are tiled, what they move isn't counted")
    name = _name(width, residual, centered)
    tensor, weight, numbers = 2 * rows * width, 4 * width, 4 * rows * (1 + centered)
    programs = -(-rows // configs.forward(width).rows)
    weights = weight * (1 + centered)
    least = Work(read=(1 + residual) * tensor + weights, written=(1 + residual) * tensor + numbers)
    work = least + Work(again=(programs - 1) * weights)
    launch = Launch("forward", work, f"{name} forward", programs, once=programs)
    yield Pass(f"norm forward, {name}", least, (launch,))
    share = -(-rows // processors)
    programs = -(-rows // share)
    moved = Work(read=(2 + residual) * tensor + weight + numbers, written=tensor)
    partial = programs * weights
    launches = (
        Launch(
            "backward",
            moved + Work(again=(programs - 1) * weight, written=partial),
            f"{name} backward",
            programs,
            once=programs,
            turns=programs * -(-share // configs.backward(width).rows),
        ),
        Launch("sum over programs", Work(read=partial, written=weights)),
    )
    yield Pass(f"norm backward, {name}", moved + Work(written=weights), launches)
