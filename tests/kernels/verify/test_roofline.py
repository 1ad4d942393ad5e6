"""The roofline: what the kernels claim of their bytes and tiles, and how ceilings are made of counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatrain.kernels.attention.verify import DOCUMENTS, packed_documents
from megatrain.kernels.verify import roofline
from megatrain.kernels.verify.case import KERNELS, Launch, Pass, Work, verifiable
from megatrain.kernels.verify.roofline import GPUS, SHAPES, Prediction, Resources, predict

pytestmark = pytest.mark.kernels

SMALL, LARGE = SHAPES
TARGETS = pytest.mark.parametrize("target", GPUS)


def moved(*passes: Pass) -> float:
    """Bytes over the least."""
    return sum(done.work.moved for done in passes) / sum(done.least.moved for done in passes)


@TARGETS
def test_norms_move_hardly_more_than_they_have_to(target: str) -> None:
    """The backward pass has a partial sum for each of P programs, of R rows together: P / R of what else it moves."""
    processors = GPUS[target].processors
    for shape in SHAPES:
        forward, backward = verifiable("norm").passes(shape, target, processors)
        programs = backward.launches[0].programs
        assert programs <= processors
        assert moved(forward) == 1.0
        assert moved(backward) == pytest.approx(1 + programs / shape.tokens, abs=1e-3)
        assert moved(forward, backward) <= (1.04 if target == "gfx942" and shape == SMALL else 1.02)
    assert moved(backward) <= 1.02


@TARGETS
@pytest.mark.parametrize("kernel", ["linear_cross_entropy", "rotary", "swiglu"])
def test_kernels_without_partial_sums_move_the_least(kernel: str, target: str) -> None:
    for done in verifiable(kernel).passes(SMALL, target, GPUS[target].processors):
        assert moved(done) == 1.0


@TARGETS
def test_causal_attention_computes_the_tiles_of_the_triangle(target: str) -> None:
    """Of S x S scores in tiles of M x N those that the diagonal crosses, and all below: the closed form."""

    def triangle(rows: int, columns: int) -> int:
        return sum(math.ceil((first + rows) / columns) for first in range(0, SMALL.length, rows))

    forward, backward = verifiable("attention").passes(SMALL, target, GPUS[target].processors)
    assert forward.least.products == 32 * 2 * 2 * 128 * 4096 * 4097 // 2
    assert backward.least.products == 32 * 5 * 2 * 128 * 4096 * 4097 // 2
    tiles = {compilation.name: compilation.constants for compilation in verifiable("attention").compilations(target)}
    for launch, products in zip((*forward.launches, *backward.launches), (2, 3, 4), strict=True):
        assert launch.compilation is not None
        m, n = (int(tiles[launch.compilation][side] or 0) for side in "MN")
        rows, columns = (n, m) if launch.name == "backward_keys" else (m, n)
        assert launch.work.products == 32 * triangle(rows, columns) * products * 2 * m * n * 128
        assert launch.programs == 32 * 4096 // rows
        assert launch.once + launch.turns == 32 * triangle(rows, columns)


@TARGETS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_documents_of_three_blocks_cost_at_most_twice_their_own(head_dim: int, target: str) -> None:
    for _, excesses in packed_documents(target, head_dim):
        curve = dict(zip(DOCUMENTS, excesses, strict=True))
        assert all(worst <= 2.0 for length, (_, worst) in curve.items() if length >= 3)
        assert all(begin <= worst for begin, worst in excesses)
        # A document of one block that begins with it: one tile of M x M for the triangle M (M + 1) / 2.
        assert 1.96 < curve[1][0] < 2.0


def test_how_many_programs_a_multiprocessor_holds() -> None:
    """As the occupancy calculator of NVIDIA's Nsight Compute has it."""
    gpu = GPUS["sm_90"]
    kernel = Resources(registers=32, shared=0, instructions=1, warps=8)
    assert kernel.resident(gpu) == 8  # 64 warps
    assert replace(kernel, warps=1).resident(gpu) == 32
    assert replace(kernel, registers=209).resident(gpu) == 1  # 2 warps a scheduler
    assert replace(kernel, registers=128).resident(gpu) == 2
    assert replace(kernel, registers=129).resident(gpu) == 1
    assert replace(kernel, shared=100 * 1024).resident(gpu) == 2
    assert replace(kernel, shared=114 * 1024).resident(gpu) == 1  # 1 KiB of each is the system's.


def test_the_highest_ceiling_is_the_bound() -> None:
    gpu = replace(GPUS["sm_90"], processors=2, clock=1e9, products=1e12, bandwidth=1e9)
    resources = Resources(registers=32, shared=0, instructions=100, warps=8, loop=40)
    launch = Launch("k", Work(read=600, again=10**9, written=400), "k", programs=3, once=3, turns=10)
    assert resources.issued(launch) == 8 * (3 * 60 + 10 * 40)
    made = predict(launch, resources, gpu)
    assert made == Prediction(memory=1e-6, issue=8 * 580 / (4 * 2e9), occupancy=2 * 8 / 64)
    assert (made.bound, made.seconds) == ("memory", 1e-6)
    launch = replace(launch, work=Work(read=600, products=2 * 10**6, exponentials=16 * 6000))
    made = predict(launch, resources, gpu)
    assert made.ceilings == {"memory": 6e-7, "products": 2e-6, "exponentials": 3e-6, "issue": 5.8e-7}
    assert (made.bound, made.seconds) == ("exponentials", 3e-6)
    assert predict(launch, None, gpu) == Prediction(memory=6e-7)


@TARGETS
def test_the_table_says_what_is_bound_by_what(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.run(KERNELS, target)
    table = capsys.readouterr().out
    assert "A prediction: nothing here was timed." in table
    bounds = {line[:44].strip(): line.split()[-1] for line in table.split("\n\n")[1].splitlines()[2:]}
    assert len(bounds) == 14
    del (
        bounds["attention backward"],
        bounds["norm backward, rms + residual 4096"],
    )  # Of their launches each has its own.
    by_products = {"attention forward", "backward_queries", "backward_keys"}
    if target == "sm_100":  # Its matrix units have outgrown the rest.
        assert {bounds[name] for name in by_products} == {"issue"}
    else:
        assert bounds == {name: "products" if name in by_products else "memory" for name in bounds}
