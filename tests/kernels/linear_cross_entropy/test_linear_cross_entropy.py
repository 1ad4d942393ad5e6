"""The linear cross-entropy: its kernels in the interpreter, its chunks in plain torch, against fp64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatrain.kernels.linear_cross_entropy import configs, op
from megatrain.kernels.linear_cross_entropy.verify import case
from megatrain.kernels.verify.interpreter import check
from megatrain.kernels.verify.measure import relative
from tests.kernels.operations import check_everywhere

pytestmark = pytest.mark.kernels


def problem(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, and targets of which every fifth is ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype) / hidden**0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, dtype=torch.int32)
    targets[::5] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


@given(
    st.integers(1, 12),
    st.integers(8, 300),
    st.integers(0, 400),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_kernels_against_fp64(
    tokens: int, vocabulary: int, first: int, padding: int, dtype: torch.dtype, seed: int
) -> None:
    check(case(torch.Generator().manual_seed(seed), tokens, vocabulary, dtype, first, padding))


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_chunks_give_what_the_whole_does(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = problem(13, 40, 8, torch.float32)
    results = []
    for chunk in (2**26, 5 * 40):
        monkeypatch.setattr(configs, "CHUNK", chunk)
        lse, of_target = op.linear_cross_entropy(x, weight, targets, triton=triton)
        results.append([lse, of_target, *torch.autograd.grad((lse * lse - of_target).sum(), (x, weight))])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")  # Where a part has no ids.
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_parts_of_the_vocabulary_make_the_whole(triton: bool) -> None:
    """As tensor-parallel ranks hold them: rows of each, one with some padding, and one with nothing else."""
    x, weight, targets = problem(13, 40, 8, torch.float32)
    padded = F.pad(weight, (0, 0, 0, 35))
    parts = [
        op.linear_cross_entropy(x, padded[first : first + 25], targets, first, count, triton)
        for first, count in ((0, 25), (25, 15), (50, 0))
    ]
    lse = torch.stack([part[0] for part in parts]).logsumexp(dim=0)
    losses = op.losses(lse, sum((part[1] for part in parts), torch.zeros(13)), targets, ignore=-100)
    expected = F.cross_entropy(x @ weight.mT, targets.long(), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(losses.sum(), (x, weight))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        assert relative(gradient, wanted) < 1e-6


def test_losses_weighted_by_token_with_z_loss() -> None:
    x, weight, targets = problem(13, 40, 8, torch.float64)
    weights = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = op.losses(*op.linear_cross_entropy(x, weight, targets, triton=False), targets, ignore=-100, z_loss=1e-2)
    logits = x @ weight.mT
    square = logits.logsumexp(dim=1).square() * (targets != -100)
    expected = F.cross_entropy(logits, targets.long(), reduction="none") + 1e-2 * square
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((losses * weights).sum(), (x, weight))
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), (x, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_an_ignored_token_has_no_gradient() -> None:
    x, weight, targets = problem(10, 40, 8, torch.float32)
    losses = op.losses(*op.linear_cross_entropy(x, weight, targets), targets, ignore=-100, z_loss=1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses[::5].tolist() == [0.0, 0.0]
    assert gradient.abs().sum(dim=1).eq(0).tolist() == [i % 5 == 0 for i in range(10)]


def test_a_vocabulary_of_128k_in_chunks() -> None:
    x, weight, targets = problem(600, 131072, 16, torch.float32)
    losses = op.losses(*op.linear_cross_entropy(x, weight, targets, triton=False), targets, ignore=-100)
    gradients = torch.autograd.grad(losses.sum(), (x, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].mT, targets.long(), reduction="none")
    assert relative(losses, expected) < 1e-6
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert relative(gradient, wanted) < 1e-6


PEAK = """
import re, sys, torch
from pathlib import Path
import torch.nn.functional as F
from megatrain.kernels.linear_cross_entropy import configs, op

def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

configs.CHUNK = 2**23  # 64 of 1024 tokens, as 512 of 8192.
x, weight = torch.randn(1024, 16, requires_grad=True), torch.randn(131072, 16, requires_grad=True)
targets = torch.randint(0, 131072, (1024,))
before = memory("VmHWM")
if sys.argv[1] == "chunked":
    loss = op.losses(*op.linear_cross_entropy(x, weight, targets, triton=False), targets, ignore=-100).sum()
else:
    loss = F.cross_entropy(x @ weight.mT, targets, reduction="sum")
loss.backward()
print(memory("VmHWM") - before)
"""
"""Prints by how many KiB the process grew (of ru_maxrss a child inherits its parent's)."""


def test_peak_memory_is_a_quarter_of_logits_then_loss() -> None:
    def peak(how: str) -> int:
        command = [sys.executable, "-c", PEAK, how]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout)

    chunked, whole = peak("chunked"), peak("logits then loss")
    assert whole > 2 * 1024 * 131072 * 4 / 1024  # The logits and their gradient.
    assert chunked <= 0.25 * whole, (chunked, whole)


def test_a_frozen_weight_costs_no_product() -> None:
    x, weight, targets = problem(10, 40, 8, torch.float32)
    product = 2 * 10 * 40 * 8
    for frozen, products in ((False, 4), (True, 3)):
        weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            lse, of_target = op.linear_cross_entropy(x, weight, targets, triton=False)
            torch.autograd.grad((lse - of_target).sum(), x if frozen else (x, weight))
        assert counter.get_total_flops() == products * product


def test_compiled_checkpointed_and_fake() -> None:
    check_everywhere(case(torch.Generator().manual_seed(0), 5, 40, torch.bfloat16))


def test_torch_finds_nothing_wrong_with_the_operations() -> None:
    x, weight, targets = problem(6, 40, 8, torch.float32)
    torch.library.opcheck(op.linear_cross_entropy_forward, (x, weight, targets, 0, 40, True))
    vectors = torch.randn(3, 6)
    operands = (x.detach(), weight.detach(), targets)
    torch.library.opcheck(op.linear_cross_entropy_backward, (*vectors[:2], *operands, vectors[2], 0, 40, True, True))
