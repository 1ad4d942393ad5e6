"""The norms' reference against PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatrain.kernels.norm import reference


def test_it_is_what_torch_computes() -> None:
    x, residual, weight, bias = torch.randn(4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = weight[0], bias[0]
    norm, summed = reference.rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, x + residual)
    torch.testing.assert_close(norm, F.rms_norm(summed, (10,), weight, 1e-5), rtol=0, atol=1e-14)
    norm, summed = reference.layer_norm(x, None, weight, bias, 1e-5)
    assert torch.equal(summed, x)
    torch.testing.assert_close(norm, F.layer_norm(x, (10,), weight, bias, 1e-5), rtol=0, atol=1e-14)
