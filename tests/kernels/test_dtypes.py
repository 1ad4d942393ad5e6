"""What the kernels don't compute in is refused, before triton is needed."""

from __future__ import annotations

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
