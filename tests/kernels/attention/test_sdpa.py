"""Attention: the reference against a loop, what the model calls against the reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain.kernels.attention import reference, sdpa
from tests.masks import masks


def inputs(batch: int, heads: int, kv_heads: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int) -> Tensor:
        shape = (batch, heads, length, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return random(heads), random(kv_heads), random(kv_heads)


@given(masks(max_length=6))
@settings(max_examples=10, deadline=None)
def test_the_reference_is_a_softmax_over_the_visible_keys(mask: tuple[Tensor, Tensor]) -> None:
    start, end = mask
    q, k, v = inputs(start.shape[0], 4, 2, start.shape[1], seed=0)
    output, lse = reference.attention(q, k, v, start, end)
    for b in range(start.shape[0]):
        for h in range(4):
            for m in range(start.shape[1]):
                seen = slice(int(start[b, m]), int(end[b, m]))
                scores = k[b, h // 2, seen] @ q[b, h, m] / 8**0.5
                torch.testing.assert_close(output[b, h, m], scores.softmax(0) @ v[b, h // 2, seen])
                torch.testing.assert_close(lse[b, h, m], scores.logsumexp(0))


@given(masks(), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_sdpa_equals_the_reference(mask: tuple[Tensor, Tensor], heads: tuple[int, int], seed: int) -> None:
    start, end = mask
    tensors = inputs(start.shape[0], *heads, start.shape[1], seed)
    expected, expected_lse = reference.attention(*tensors, start, end)
    prepared = sdpa.prepare(start, end, keys=start.shape[1])
    output = sdpa.attention(*tensors, prepared)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(output, tensors, weights)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors, weights), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)
    again, lse = sdpa.attention(*tensors, prepared, return_lse=True)
    assert torch.equal(again, expected)
    assert torch.equal(lse, expected_lse)


def test_dtypes() -> None:
    start = torch.zeros(1, 4, dtype=torch.int32)
    mask = sdpa.prepare(start, start + 4, keys=4)
    q, k, v = (tensor.detach().bfloat16() for tensor in inputs(1, 2, 1, 4, seed=0))
    output, lse = sdpa.attention(q, k, v, mask, return_lse=True)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert sdpa.attention(q, k, v, mask).dtype == torch.bfloat16


def test_fewer_queries_than_keys() -> None:
    """Start and end count in the whole sequence, so a slice of the queries needs nothing else."""
    q, k, v = inputs(1, 2, 2, 6, seed=1)
    start, end = torch.zeros(1, 6, dtype=torch.int32), torch.arange(1, 7, dtype=torch.int32)[None]
    whole = sdpa.attention(q, k, v, sdpa.prepare(start, end, keys=6))
    part = sdpa.attention(q[:, :, 4:], k, v, sdpa.prepare(start[:, 4:], end[:, 4:], keys=6))
    torch.testing.assert_close(part, whole[:, :, 4:], rtol=0, atol=1e-12)
