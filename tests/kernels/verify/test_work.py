"""What verify.py says that a kernel moves and computes is what the interpreter sees it move and compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatrain import device
from megatrain.kernels.attention import configs, work
from megatrain.kernels.attention import op as attention
from megatrain.kernels.attention.verify import masks
from megatrain.kernels.linear_cross_entropy import op as linear_cross_entropy
from megatrain.kernels.norm import op as norm
from megatrain.kernels.norm.verify import norm_passes
from megatrain.kernels.rotary import op as rotary
from megatrain.kernels.swiglu import op as swiglu
from megatrain.kernels.verify.case import INTERPRETER, Pass, Shape, Work, verifiable
from megatrain.kernels.verify.interpreter import watch
from tests.masks import masks as random_masks

pytestmark = pytest.mark.kernels

PROCESSORS = device.processors(device.CPU)
SHAPE = Shape(2, 37, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=2056, vocabulary=8200)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def check(passes: Iterator[Pass], *calls: Callable[[], object]) -> None:
    """The launches of each pass against those of a call."""
    for counted, call in zip(passes, calls, strict=True):
        with watch() as watching:
            call()
        assert [launch.work for launch in counted.launches if launch.compilation] == watching.work


def check_attention(
    start: Tensor,
    end: Tensor,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 32,
    passes: Iterator[Pass] | None = None,
) -> None:
    (batch, length), (kv_heads, group) = start.shape, heads
    seen = attention.intervals(start, end, length)
    intervals = seen.start, seen.end, seen.column_start, seen.column_end
    q, do = bf16(batch, kv_heads, group, length, head_dim), bf16(batch, kv_heads, group, length, head_dim)
    k, v = bf16(batch, kv_heads, length, head_dim), bf16(batch, kv_heads, length, head_dim)
    o, lse = attention.attention_forward(q, k, v, *intervals)
    check(
        passes or work.passes(seen, *heads, head_dim, configs.INTERPRETER, "any"),
        lambda: attention.attention_forward(q, k, v, *intervals),
        lambda: attention.attention_backward(do, torch.zeros_like(lse), q, k, v, o, lse, *intervals),
    )


@pytest.mark.parametrize("mask", list(masks(1, 75)), ids=lambda mask: mask[0])
def test_attention(mask: tuple[str, Tensor, Tensor]) -> None:
    check_attention(mask[1], mask[2], heads=(1, 2))


def test_attention_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "INTERPRETER", replace(configs.INTERPRETER, tma=False))
    _, start, end = list(masks(1, 75))[3]
    check_attention(start, end)


@given(random_masks(max_length=80))
@settings(max_examples=10, deadline=None)
def test_attention_of_any_mask(mask: tuple[Tensor, Tensor]) -> None:
    check_attention(*mask, heads=(1, 1), head_dim=40)


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_attention_in_shipped_tiles(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "INTERPRETER", configs.tiles(arch, 64, itemsize=2))
    check_attention(*list(masks(1, 230))[1][1:], heads=(1, 2), head_dim=64)


def test_causal_attention_as_a_block_has_it() -> None:
    m = torch.arange(SHAPE.length, dtype=torch.int32).expand(SHAPE.batch, -1)
    passes = verifiable("attention").passes(SHAPE, INTERPRETER, PROCESSORS)
    check_attention(torch.zeros_like(m), m + 1, (2, 2), 32, passes)


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("rows", "width"), [(3, 8192), (5, 200), (150, 128)])
def test_norm(rows: int, width: int, residual: bool, centered: bool) -> None:
    x, dy, other = bf16(rows, width), bf16(rows, width), bf16(rows, width) if residual else None
    weight, bias = torch.randn(width), torch.randn(width) if centered else None
    _, summed, mean, rstd = norm.norm_forward(x, other, weight, bias, 1e-5)
    check(
        norm_passes(rows, width, PROCESSORS, residual, centered),
        lambda: norm.norm_forward(x, other, weight, bias, 1e-5),
        lambda: norm.norm_backward(dy, other, summed if residual else x, weight, bias, mean, rstd),
    )


def test_norm_of_rows_that_are_tiled_is_not_counted() -> None:
    with pytest.raises(ValueError, match="rows of 8200 are tiled"):
        next(norm_passes(1, 8200, PROCESSORS))


def test_rotary() -> None:
    groups, half = SHAPE.kv_heads, SHAPE.head_dim // 2
    x = bf16(SHAPE.batch, SHAPE.length, groups * 4 * SHAPE.head_dim)
    cos, sin = torch.randn(2, SHAPE.batch, SHAPE.length, 1, half)
    check(
        verifiable("rotary").passes(SHAPE, INTERPRETER, PROCESSORS),
        lambda: rotary.rotary_forward(x, cos, sin, 4, 3),
        lambda: rotary.rotary_backward(x, cos, sin, 4, 3),
    )


def test_rotary_of_several_programs_a_token() -> None:
    shape = replace(SHAPE, heads=32, kv_heads=32, head_dim=128, length=3)
    x = bf16(shape.batch, shape.length, 32 * 3 * 128)
    cos, sin = torch.randn(2, shape.batch, shape.length, 1, 64)
    check(
        verifiable("rotary").passes(shape, INTERPRETER, PROCESSORS),
        lambda: rotary.rotary_forward(x, cos, sin, 3, 2),
        lambda: rotary.rotary_backward(x, cos, sin, 3, 2),
    )


def test_swiglu() -> None:
    gate_up, dy = bf16(SHAPE.tokens, 2 * SHAPE.intermediate), bf16(SHAPE.tokens, SHAPE.intermediate)
    check(
        verifiable("swiglu").passes(SHAPE, INTERPRETER, PROCESSORS),
        lambda: swiglu.swiglu_forward(gate_up),
        lambda: swiglu.swiglu_backward(dy, gate_up),
    )


def test_linear_cross_entropy() -> None:
    tokens, ids = SHAPE.tokens, SHAPE.vocabulary
    x, weight = bf16(tokens, 16), bf16(ids, 16)
    targets = torch.randint(0, ids, (tokens,), dtype=torch.int32)
    options = 0, ids, True
    lse, of_target = linear_cross_entropy.linear_cross_entropy_forward(x, weight, targets, *options)
    gradients = torch.ones_like(lse), torch.ones_like(of_target)
    check(
        verifiable("linear_cross_entropy").passes(SHAPE, INTERPRETER, PROCESSORS),
        lambda: linear_cross_entropy.linear_cross_entropy_forward(x, weight, targets, *options),
        lambda: linear_cross_entropy.linear_cross_entropy_backward(
            *gradients, x, weight, targets, lse, *options, False
        ),
    )


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5) + Work(10, 20, 30, 40, 50) == Work(11, 22, 33, 44, 55)
