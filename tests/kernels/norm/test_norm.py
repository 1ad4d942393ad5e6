"""The norm kernels in the interpreter, against fp64, and as operations of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain.kernels.norm import op, reference
from megatrain.kernels.norm.verify import case
from megatrain.kernels.verify.interpreter import check
from tests.kernels.operations import check_everywhere

pytestmark = pytest.mark.kernels

SHAPES = st.tuples(st.integers(1, 9), st.integers(8, 300))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(SHAPES, DTYPES, st.booleans(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_norms_against_fp64(
    shape: tuple[int, int], dtype: torch.dtype, residual: bool, centered: bool, seed: int
) -> None:
    check(case(torch.Generator().manual_seed(seed), *shape, dtype, residual, centered))


@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("width", [8193, 16392, 40000])
def test_rows_too_wide_for_a_tile(width: int, centered: bool) -> None:
    check(case(torch.Generator().manual_seed(0), 3, width, torch.float32, residual=True, centered=centered))


def test_more_rows_than_the_programs_take_at_once() -> None:
    """On the CPU 4 programs share 300 rows of a tile of 32."""
    check(case(torch.Generator().manual_seed(0), 150, 128, torch.float32, residual=True, centered=True))


@pytest.mark.parametrize("width", [256, 20000])
def test_a_mean_far_from_zero_cancels_nothing(width: int) -> None:
    """The variance is of distances to the mean: a mean of 100 deviations costs only what rounding the inputs does."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(2, width, generator=generator)
    weight, bias = torch.randn(2, width, generator=generator)
    norm, _ = op.layer_norm(x, None, weight, bias, 1e-5)
    expected = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    assert float((norm - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("used", [("norm",), ("sum",), ("norm", "sum")], ids="+".join)
def test_either_output_may_be_unused(used: tuple[str, ...]) -> None:
    x, residual, *upstream = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(16)
    gradients = []
    for norm, dtype in ((op.rms_norm, torch.float32), (reference.rms_norm, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        outputs = dict(zip(("norm", "sum"), norm(leaf, residual.to(dtype), weight.to(dtype), 1e-5), strict=True))
        weights = dict(zip(("norm", "sum"), upstream, strict=True))
        gradients += torch.autograd.grad([outputs[u] for u in used], leaf, [weights[u].to(dtype) for u in used])
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=0, atol=1e-6)


def test_rows_that_are_apart() -> None:
    """A view whose rows aren't next to each other, as queries in a packed projection."""
    packed = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(16)
    norm, _ = op.rms_norm(packed[..., 8:24], None, weight, 1e-5)
    torch.testing.assert_close(norm, op.rms_norm(packed[..., 8:24].contiguous(), None, weight, 1e-5)[0], rtol=0, atol=0)


def test_gradients_have_the_dtype_of_what_they_are_of() -> None:
    x, weight = torch.randn(3, 16).bfloat16().requires_grad_(), torch.ones(16, requires_grad=True)
    narrow = torch.ones(16, dtype=torch.bfloat16, requires_grad=True)
    for scale in (weight, narrow):
        norm, _ = op.rms_norm(x, None, scale, 1e-5)
        gradients: tuple[Tensor, ...] = torch.autograd.grad(norm.sum(), (x, scale))
        assert [norm.dtype, *(g.dtype for g in gradients)] == [torch.bfloat16, torch.bfloat16, scale.dtype]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_compiled_checkpointed_and_fake(residual: bool, centered: bool) -> None:
    check_everywhere(case(torch.Generator().manual_seed(0), 3, 40, torch.bfloat16, residual, centered))


def test_torch_finds_nothing_wrong_with_the_operations() -> None:
    x, residual, dy = torch.randn(3, 4, 16)
    weight, bias = torch.randn(2, 16)
    _, summed, mean, rstd = op.norm_forward(x, residual, weight, bias, 1e-5)
    torch.library.opcheck(op.norm_backward, (dy, None, summed, weight, bias, mean, rstd))
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]
    torch.library.opcheck(op.norm_forward, (*leaves, 1e-5))
