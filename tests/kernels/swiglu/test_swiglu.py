"""The SwiGLU kernels in the interpreter, against fp64, and as operations of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain.kernels.swiglu import op, reference
from megatrain.kernels.swiglu.verify import case
from megatrain.kernels.verify.interpreter import check
from tests.kernels.operations import check_everywhere

pytestmark = pytest.mark.kernels


@given(
    st.integers(1, 5),
    st.one_of(st.integers(1, 300), st.integers(2040, 2100)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_swiglu_against_fp64(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    check(case(torch.Generator().manual_seed(seed), rows, width, dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_from_zero() -> None:
    """exp overflows in fp32 from 89 on: silu is 0 below and its argument above, its slope 0 and 1."""
    gate_up = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0, *[1.0] * 5]], requires_grad=True)
    y = op.swiglu(gate_up)
    assert y.tolist() == [[0.0, 0.0, 0.0, 90.0, 200.0]]
    (gradient,) = torch.autograd.grad(y.sum(), gate_up)
    assert gradient.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0, 90.0, 200.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_has_the_same_bits(dtype: torch.dtype) -> None:
    """As with the product kept, of which only what it is made of is."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((2, 3, 80), (40, 16))]
    gradient = torch.randn(2, 3, 16, generator=generator).to(dtype)

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[Tensor], set[int]]:
        """The result with gradients, and the widths of what is kept."""
        kept: set[int] = set()

        def keep(x: Tensor) -> Tensor:
            kept.add(x.shape[-1])
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            z = function(*leaves)
        return [z, *torch.autograd.grad(z, leaves, gradient)], kept

    (results, kept), (expected, kept_apart) = run(op.swiglu_linear), run(lambda x, weight: op.swiglu(x) @ weight)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert (kept, kept_apart) == ({80, 16}, {80, 16, 40})


def test_a_view() -> None:
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))[..., 4:12]
    torch.testing.assert_close(op.swiglu(x), reference.swiglu(x), rtol=1e-6, atol=1e-6)


def test_compiled_checkpointed_and_fake() -> None:
    check_everywhere(case(torch.Generator().manual_seed(0), 3, 40, torch.bfloat16))


def test_torch_finds_nothing_wrong_with_the_operations() -> None:
    torch.library.opcheck(op.swiglu_forward, (torch.randn(3, 16, requires_grad=True),))
    torch.library.opcheck(op.swiglu_backward, (torch.randn(3, 8), torch.randn(3, 16)))
