"""The linear cross-entropy for kernels/verify: what is run in the interpreter, and what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from torch import Generator, Tensor

from megatrain.kernels.linear_cross_entropy import configs, op, reference
from megatrain.kernels.verify.case import (
    DTYPES,
    FP32_TERMS,
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

HIDDEN = 16


def case(
    generator: Generator,
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    first: int = 0,
    padding: int = 0,
) -> Case:
    """Targets of ids 0 to 2 * vocabulary and -100; the ids of this part are `vocabulary` from `first` on."""
    targets = torch.randint(0, 2 * vocabulary, (tokens,), generator=generator, dtype=torch.int32)
    targets[::5] = -100
    return Case(
        name=f"{tokens} tokens, {vocabulary} ids from {first}, {dtype}",
        operation=lambda x, weight, ids: _with_loss(*op.linear_cross_entropy(x, weight, ids, first, vocabulary)),
        reference=lambda x, weight, ids: _with_loss(*reference.linear_cross_entropy(x, weight, ids, first, vocabulary)),
        inputs={
            "x": torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
            "weight": (torch.randn(vocabulary + padding, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
            "targets": targets,
        },
    )


def _with_loss(lse: Tensor, of_target: Tensor) -> tuple[Tensor, Tensor]:
    # Not the target's logit by itself: a logit may be near 0, with the error of a product of large numbers.
    return lse, lse - of_target


def cases(generator: Generator) -> Iterator[Case]:
    """Vocabularies within a tile and beyond, whole and in part, in both dtypes."""
    for vocabulary, first, padding in ((50, 0, 0), (300, 300, 12), (configs.FORWARD_BLOCK + 100, 0, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            yield case(generator, 7, vocabulary, dtype, first, padding)


def random_case(draw: Random, size: int) -> Case:
    """Any number of tokens and ids, the first ids or others, with and without padding."""
    dtype = draw.choice(DTYPES)
    most = FP32_TERMS if dtype == torch.float32 else 50_000
    vocabulary = size_between(draw, 10, min(most, size // 4))
    tokens = size_between(draw, 1, min(most, size // vocabulary))
    return case(generator_of(draw), tokens, vocabulary, dtype, draw.choice((0, vocabulary)), draw.choice((0, 4, 12)))


def compilations(target: str) -> Iterator[Compilation]:
    """Both kernels in bf16."""
    vectors = dict.fromkeys(("lse", "of_target", "dlse", "dof_target"), "*fp32")
    integers = dict.fromkeys(("width", "first", "count"), "i32")
    for kernel, block in (("forward", configs.FORWARD_BLOCK), ("backward", configs.BACKWARD_BLOCK)):
        yield Compilation(
            name=f"linear_cross_entropy {kernel}",
            function=f"megatrain.kernels.linear_cross_entropy.kernel:{kernel}",
            types={"logits": "*bf16", "targets": "*i32", **vectors, **integers},
            constants={"BLOCK": block},
            divisible=("width", "count"),
            num_warps=TARGETS[target].warps(configs.THREADS),
            instructions=(WIDE_LOAD,) if kernel == "forward" else (WIDE_LOAD, WIDE_STORE),
        )


def passes(shape: Shape, target: str, processors: int) -> Iterator[Pass]:  # noqa: ARG001
    """From logits to log-sum-exps, and from those to the logits' gradients; the products around are cuBLAS's."""
    rows, width = shape.tokens, shape.vocabulary
    turns = -(-width // configs.FORWARD_BLOCK)
    least = Work(read=rows * (2 * width + 4), written=rows * 8)
    work = least + Work(again=rows * 2, exponentials=rows * turns * (configs.FORWARD_BLOCK + 1))
    launch = Launch("forward", work, "linear_cross_entropy forward", rows, once=rows, turns=rows * turns)
    yield Pass("linear_cross_entropy forward, from logits", least, (launch,))
    blocks = -(-width // configs.BACKWARD_BLOCK)
    vectors = 16  # Of each row: the target, the log-sum-exp, and the gradients of both outputs.
    least = Work(read=rows * (2 * width + vectors), written=rows * 2 * width)
    programs = rows * blocks
    work = least + Work(again=rows * (blocks - 1) * vectors, exponentials=programs * configs.BACKWARD_BLOCK)
    launch = Launch("backward", work, "linear_cross_entropy backward", programs, once=programs)
    yield Pass("linear_cross_entropy backward, of logits", least, (launch,))
