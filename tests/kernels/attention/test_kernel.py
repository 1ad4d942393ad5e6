"""The Triton kernels of attention in the interpreter: numbers, memory, what they skip, and operands of every form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from megatrain.kernels.attention import configs, kernel, op, verify
from megatrain.kernels.attention.configs import Tiles
from megatrain.kernels.verify.case import Case
from megatrain.kernels.verify.interpreter import check
from tests.masks import brute_force, masks

pytestmark = pytest.mark.kernels

CASES = list(verify.cases(torch.Generator().manual_seed(0)))


@pytest.fixture(params=[True, False], ids=["descriptors", "pointers"])
def operands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors come to the kernels in one form, then in the other."""
    monkeypatch.setattr(configs, "INTERPRETER", replace(configs.INTERPRETER, tma=request.param))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert set(check(case)) == {"0", "1", "q", "k", "v"}


@pytest.mark.usefixtures("operands")
@given(
    st.integers(20, 100),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    st.sampled_from([8, 16, 32, 40]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mask(length: int, batch: int, heads: tuple[int, int], head_dim: int, packed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, end = verify.random_mask(batch, length, generator, rises=0.1)
    check(verify.case("any", generator, start, end, length, heads, head_dim, torch.float32, packed))


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_shipped_tiles(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles larger than the sequence, and a few of them."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.tiles(architecture, 64, itemsize=2))
    for length in (50, 230):
        _, start, end = list(verify.masks(1, length))[1]
        generator = torch.Generator().manual_seed(0)
        check(verify.case(architecture, generator, start, end, length, (1, 2), 64, torch.bfloat16))


@given(masks())
@settings(max_examples=60, deadline=None)
def test_columns_are_the_mask_read_by_column(mask: tuple[Tensor, Tensor]) -> None:
    start, end = mask
    seen = op.intervals(start, end, start.shape[1])
    assert seen.column_start.dtype == seen.column_end.dtype == torch.int32
    query = torch.arange(start.shape[1])[:, None]
    by_column = (seen.column_start[:, None, :] <= query) & (query < seen.column_end[:, None, :])
    assert torch.equal(by_column, brute_force(start, end))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The FLOPs of the tiles multiplied."""
    counted: list[int] = []
    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counted.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return original(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return counted


def touched(low: Tensor, high: Tensor, rows: int, columns: int) -> int:
    """Of a mask's tiles of rows x columns those between a block's first and last visible position, for [S] each."""
    starts = range(0, len(low), rows)
    return sum(-(-int(high[i : i + rows][-1]) // columns) - int(low[i]) // columns for i in starts)


@pytest.mark.parametrize("mask", list(verify.masks(1, 160)), ids=lambda mask: mask[0])
def test_only_tiles_that_are_seen_are_computed(mask: tuple[str, Tensor, Tensor], products: list[int]) -> None:
    _, start, end = mask
    seen = op.intervals(start, end, 160)
    q = torch.randn(1, 1, 2, 160, 32, requires_grad=True)
    k, v = torch.randn(2, 1, 1, 160, 32, requires_grad=True).unbind()
    tiles: Tiles = configs.INTERPRETER
    output, _ = op.attention(q, k, v, seen)
    expected = {}
    for name, low, high, by_queries in (
        ("forward", start, end, True),
        ("backward_queries", start, end, True),
        ("backward_keys", seen.column_start, seen.column_end, False),
    ):
        tile = getattr(tiles, name)
        rows, columns = (tile.queries, tile.keys) if by_queries else (tile.keys, tile.queries)
        expected[name] = 2 * touched(low[0], high[0], rows, columns) * 2 * rows * columns * 32
    assert sum(products) == 2 * expected["forward"]
    products.clear()
    torch.autograd.grad(output.sum(), (q, k, v))
    assert sum(products) == 3 * expected["backward_queries"] + 4 * expected["backward_keys"]


@pytest.mark.parametrize("shift", [0, 1, 7, 16, 31])
def test_documents_of_three_blocks_cost_at_most_twice_their_own(shift: int, products: list[int]) -> None:
    """Wherever they begin, which the first document's length decides."""
    document = 3 * configs.INTERPRETER.forward.queries
    length = 4 * document + shift
    m = torch.arange(length, dtype=torch.int32)[None]
    start = torch.where(m < document + shift, 0, (m - shift) // document * document + shift)
    q = torch.randn(1, 1, 1, length, 32)
    op.attention(q, q[:, :, 0], q[:, :, 0], op.intervals(start, m + 1, length))
    assert sum(products) <= 2 * 4 * 32 * int((m + 1 - start).sum())


@pytest.mark.usefixtures("operands")
def test_parts_of_the_keys_merge_into_the_whole() -> None:
    """Context parallelism: the log-sum-exps, and their gradients, put parts together; some see none of a part."""
    torch.manual_seed(0)
    m = torch.arange(70, dtype=torch.int32)[None]
    start, end = (m - 20).clamp(min=0), m + 1
    q = torch.randn(1, 1, 2, 70, 32, requires_grad=True)
    k, v = (torch.randn(1, 1, 70, 32, requires_grad=True) for _ in range(2))
    whole, whole_lse = op.attention(q, k, v, op.intervals(start, end, 70))
    parts = [
        op.attention(
            q, k[:, :, i:j], v[:, :, i:j], op.intervals((start - i).clamp(0, j - i), (end - i).clamp(0, j - i), j - i)
        )
        for i, j in ((0, 33), (33, 70))
    ]
    assert parts[0][1][0, 0, :, 60].tolist() == [float("-inf")] * 2
    assert parts[0][0][0, 0, :, 60].count_nonzero() == 0
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum((part * (part_lse - lse).exp()[..., None] for part, part_lse in parts), torch.zeros(()))
    torch.testing.assert_close(merged, whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=2e-6)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (q, k, v), weights)
    for gradient, wanted in zip(torch.autograd.grad(merged, (q, k, v), weights), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=5e-6)


def test_operands_that_are_not_aligned_are_copied() -> None:
    torch.manual_seed(0)
    m = torch.arange(20, dtype=torch.int32)[None]
    seen = op.intervals(torch.zeros_like(m), m + 1, 20)
    odd = torch.randn(3, 1, 1, 20, 33)[..., 1:]
    q, k, v = odd[0][:, :, None].requires_grad_(), odd[1], odd[2]
    output, _ = op.attention(q, k, v, seen)
    again, _ = op.attention(q.contiguous(), k.contiguous(), v.contiguous(), seen)
    assert torch.equal(output, again)
    (gradient,) = torch.autograd.grad(output.sum(), q, retain_graph=True)  # Of a sum: expanded, with strides of 0.
    (wanted,) = torch.autograd.grad(output, q, torch.ones_like(output))
    assert torch.equal(gradient, wanted)


@triton.jit  # type: ignore[untyped-decorator]
def addresses(x: Any, out: Any, b: Any, h: Any, g: Any, row: Any) -> None:
    """Where the kernels look for a tile of [2, 32]."""
    place = tl.arange(0, 2)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + place, kernel._pointers(x, b, h, g, row, 2, 32).to(tl.int64))


def test_offsets_have_64_bits() -> None:
    x, out = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(2, 32, dtype=torch.int64)
    strides = (2**34, 2**20, 2**10, 2**13)
    addresses[(1,)]((x, *strides, 2**20), out, 3, 5, 7, 2**20 - 2)
    first = 3 * 2**34 + 5 * 2**20 + 7 * 2**10 + (2**20 - 2) * 2**13
    assert ((out - x.data_ptr()) // 2).tolist() == [[first + i * 2**13 + j for j in range(32)] for i in range(2)]
