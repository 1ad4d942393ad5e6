"""The rotary kernel in the interpreter, against fp64 and the model's own, and as an operation of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.kernels.rotary import op, reference
from megatrain.kernels.rotary.verify import case
from megatrain.kernels.verify.interpreter import check
from megatrain.model.rotary import rotate
from tests.kernels.operations import check_everywhere

pytestmark = pytest.mark.kernels

GROUPS = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda sizes: st.tuples(st.just(sizes[0]), st.just(sizes[1]), st.integers(1, sizes[1]))
)


@given(GROUPS, st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_rotations_against_fp64(groups: tuple[int, int, int], half: int, dtype: torch.dtype, seed: int) -> None:
    check(case(torch.Generator().manual_seed(seed), *groups, half, dtype))


def test_it_is_the_models_rotation_in_place() -> None:
    """Of a packed projection of 2 groups of 3 queries, a key and a value: the values stay."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 4, 2 * 5 * 8, generator=generator)
    angles = torch.rand(2, 4, 1, 4, generator=generator)
    before = packed.clone().view(2, 4, 2, 5, 8)
    memory = packed.data_ptr()
    result = op.rotate_(packed, angles.cos(), angles.sin(), group=5, rotated=4)
    assert result.data_ptr() == memory
    after = packed.view(2, 4, 2, 5, 8)
    for head in range(4):
        torch.testing.assert_close(after[..., head, :], rotate(before[..., head, :], angles.cos(), angles.sin()))
    assert torch.equal(after[..., 4, :], before[..., 4, :])


def test_gradients_go_through_what_was_changed() -> None:
    """The projection that made x keeps its inputs, not x: that x changed is nothing to it."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, upstream = (torch.randn(2, 12, 12, generator=generator) for _ in range(3))
    weight = weight[0].requires_grad_()
    angles = torch.rand(2, 12, 1, 2, generator=generator)
    turned = op.rotate_(hidden @ weight, angles.cos(), angles.sin(), group=3, rotated=2)
    expected = reference.rotate(hidden @ weight, angles.cos(), angles.sin(), group=3, rotated=2)
    gradients = [torch.autograd.grad(result, weight, upstream)[0] for result in (turned, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_it_refuses_what_it_would_have_to_copy() -> None:
    angles = torch.rand(1, 3, 1, 4)
    with pytest.raises(ValueError, match="needs a contiguous tensor"):
        op.rotate_(torch.randn(1, 3, 40)[..., 8:24], angles.cos(), angles.sin())


def test_compiled_checkpointed_and_fake() -> None:
    check_everywhere(case(torch.Generator().manual_seed(0), 2, 5, 4, 8, torch.bfloat16))


def test_torch_finds_nothing_wrong_with_the_operations() -> None:
    angles = torch.rand(1, 3, 1, 4)
    arguments = (torch.randn(1, 3, 24), angles.cos(), angles.sin(), 3, 2)
    torch.library.opcheck(op.rotary_forward, arguments)
    torch.library.opcheck(op.rotary_backward, arguments)
