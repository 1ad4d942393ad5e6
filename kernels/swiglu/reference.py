"""SwiGLU written out: the mathematics that the kernel is tested against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), [..., N] from [..., 2 N], whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """swiglu(gate_up) weight, [..., H] from [..., 2 N] and [N, H]."""
    return swiglu(gate_up) @ weight
