"""The operators around the Triton kernels: what torch knows of them, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget

from megatrain.kernels.attention import configs, launch, op
from megatrain.kernels.attention.verify import case, masks
from tests.kernels.operations import check_everywhere


def inputs(requires_grad: bool = False, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, op.Intervals]:
    m = torch.arange(10, dtype=torch.int32, device=device)[None]
    q = torch.randn(1, 2, 3, 10, 16, device=device, requires_grad=requires_grad)
    k, v = (torch.randn(1, 2, 10, 16, device=device, requires_grad=requires_grad) for _ in range(2))
    return q, k, v, op.intervals(torch.zeros_like(m), m + 1, 10)


@pytest.mark.kernels
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_checkpointed_and_fake(packed: bool) -> None:
    _, start, end = next(masks(2, 40))
    generator = torch.Generator().manual_seed(0)
    check_everywhere(case("causal", generator, start, end, 40, (2, 2), 16, torch.float32, packed))


@pytest.mark.kernels
def test_torch_knows_the_operators() -> None:
    q, k, v, seen = inputs(requires_grad=True)
    of_mask = (seen.start, seen.end, seen.column_start, seen.column_end)
    torch.library.opcheck(op.attention_forward, (q, k, v, *of_mask))
    with torch.no_grad():
        o, lse = op.attention(q, k, v, seen)
        arguments = (torch.ones_like(o), torch.ones_like(lse), q, k, v, o, lse, *of_mask)
        torch.library.opcheck(op.attention_backward, tuple(x.detach() for x in arguments))


def test_shapes_and_flops_without_a_kernel() -> None:
    """On the meta device, where nothing runs: also what says that triton isn't needed for it."""
    q, k, v, seen = inputs(requires_grad=True, device="meta")
    with FlopCounterMode(display=False) as counter:
        o, lse = op.attention(q, k, v, seen)
        torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (1, 2, 3, 10), torch.float32)
    assert o.permute(0, 3, 1, 2, 4).is_contiguous()
    product = 2 * 6 * 10 * 10 * 16
    assert counter.get_total_flops() == (2 + 7) * product


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, seen = inputs()
    with pytest.raises(TypeError, match=r"q, k, v are torch.bfloat16, torch.float32, .*; legal: one dtype for all"):
        op.attention(q.bfloat16(), k, v, seen)
    with pytest.raises(ValueError, match=r"q is \[2, 3, 10, 16\], k \[1, 2, 10, 16\]; legal: \[B, H, G, Sq, D\] and"):
        op.attention(q[0], k, v, seen)
    with pytest.raises(ValueError, match=r"k is \[1, 2, 10, 8\], has to be \[1, 2, 10, 16\]"):
        op.attention(q, k[..., :8], v, seen)
    with pytest.raises(ValueError, match=r"column_start is \[1, 10\], has to be \[1, 9\]"):
        op.attention(q, k[:, :, :9], v[:, :, :9], seen)
    with pytest.raises(ValueError, match="head dimension 12; legal: multiples of 8 up to 256"):
        op.attention(q[..., :12], k[..., :12], v[..., :12], seen)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"need a GPU, or TRITON_INTERPRET=1"):
        op.attention(q, k, v, seen)
    with pytest.raises(ValueError, match="no Triton kernel for gfx90a; legal: sm_80, sm_90, sm_100, gfx942"):
        configs.tiles("gfx90a", 128, 2)


def test_a_gpu_finds_its_tiles() -> None:
    for target in (GPUTarget("cuda", 100, 32), GPUTarget("hip", "gfx942", 64)):
        assert launch.architecture(target) in configs.ARCHITECTURES


def test_tiles_of_every_head_dimension() -> None:
    for architecture in configs.ARCHITECTURES:
        for head_dim in range(8, 257, 8):
            for itemsize in (2, 4):
                assert configs.tiles(architecture, head_dim, itemsize).forward.queries >= 16
    assert configs.tiles("sm_90", 80, 2) is configs.tiles("sm_90", 128, 2)
