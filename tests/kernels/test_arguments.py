"""What the kernels can't take is refused, before they read what isn't theirs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatrain.kernels.attention.op import attention, intervals
from megatrain.kernels.linear_cross_entropy.op import linear_cross_entropy
from megatrain.kernels.norm.op import rms_norm
from megatrain.kernels.rotary.op import rotate_
from megatrain.kernels.swiglu.op import swiglu

X = torch.zeros(1, 2, 8, dtype=torch.float64)
ROWS = torch.arange(2, dtype=torch.int32)[None]
ANGLES = torch.zeros(1, 2, 1, 4)


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("attention", lambda: attention(X[None, None], X[None], X[None], intervals(ROWS, ROWS + 1, 2))[0]),
        ("norm", lambda: rms_norm(X, None, torch.ones(8), 1e-5)[0]),
        ("swiglu", lambda: swiglu(X)),
        ("rotary", lambda: rotate_(X, ANGLES, ANGLES)),
        ("linear_cross_entropy", lambda: linear_cross_entropy(X[0], X[0], torch.zeros(2, dtype=torch.int32))[0]),
    ],
)
def test_fp64_is_refused(operation: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(TypeError, match=f"{operation} has no kernel for torch.float64; legal: torch.float32, torch.b"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, None, torch.ones(7), 1e-5), "norm: weight is [7], has to be [8]"),
        (lambda x: rms_norm(x, x[:, :1], torch.ones(8), 1e-5), "norm: residual is [1, 1, 8], has to be [1, 2, 8]"),
        (lambda x: rotate_(x, ANGLES[:, :1], ANGLES[:, :1]), "rotary: x is [1, 2, 8], has to be [1, 1, 8]"),
        (lambda x: rotate_(x, ANGLES, ANGLES, group=3), "rotary: x is [1, 2, 8], has to be [1, 2, 24]"),
        (lambda x: linear_cross_entropy(x[0], x[0], torch.zeros(3)), "targets is [3], has to be [2]"),
    ],
)
def test_other_sizes_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(X.float())
