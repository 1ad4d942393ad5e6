"""The same work by our kernels, by PyTorch and by the libraries that are installed, for `verify device` to time.

Design choices:
- Each gets its tensors in the layout that it is made for, so none pays for a copy that its users don't.
- Work is what the task needs, not what an implementation does: bytes that have to move once, FLOPs under the mask, a
  backward pass twice (attention: 2.5 times) the forward pass. So the rates compare as the times do.
- A library that isn't installed, fails, or gives another result (so does other work) is left out, and why is said.
- Their signatures are those of flash-attn 2.8.3, flash-attn-4 4.0.0b36 and liger-kernel 0.8.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.kernels.attention import op as attention_op
from megatrain.kernels.linear_cross_entropy import op as linear_cross_entropy_op
from megatrain.kernels.norm import op as norm_op
from megatrain.kernels.rotary import op as rotary_op
from megatrain.kernels.swiglu import op as swiglu_op
from megatrain.kernels.verify.case import Shape
from megatrain.kernels.verify.measure import KernelError, relative

OURS, TORCH, LIGER = "megatrain", "torch", "liger"

AGREEMENT = 0.03
"""The relative L2 distance that two implementations in bf16 may have."""

EPS = 1e-5


@dataclass(frozen=True)
class Contender:
    """One implementation. forward, both: run a forward pass, a forward and a backward pass. result: what it gives."""

    forward: Callable[[], object]
    both: Callable[[], object]
    result: Tensor


@dataclass(frozen=True)
class Race:
    """Implementations of the same work, by name, ours first.

    forward, both: the work of a forward pass and of both, FLOPs or bytes as `unit` says. absent: of libraries that take
    no part, why.
    """

    task: str
    forward: float
    both: float
    unit: Literal["TFLOP/s", "GB/s"]
    contenders: dict[str, Contender] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, contender: Contender) -> None:
        """Adds one, ours first. Raises KernelError where its result differs from ours."""
        ours = self.contenders.get(OURS, contender).result
        apart = relative(contender.result.reshape(ours.shape), ours)
        if not apart <= AGREEMENT:
            raise KernelError(f"{name}'s result is {apart:.1e} apart from ours")
        self.contenders[name] = contender

    def add_installed(self, name: str, function: str, make: Callable[[Any], Contender]) -> None:
        """Adds what `make` gives for a library's function, "module:name"; or why not."""
        module, _, attribute = function.partition(":")
        try:
            self.add(name, make(getattr(import_module(module), attribute)))
        except Exception as error:  # What is wrong with a library says nothing of our kernel.
            self.absent[name] = f"{type(error).__name__}: {error}"


def race(kernel: str, shape: Shape, where: torch.device) -> Race:
    """A kernel's, in bf16."""
    races = {
        "attention": attention,
        "linear_cross_entropy": linear_cross_entropy,
        "norm": norm,
        "rotary": rotary,
        "swiglu": swiglu,
    }
    return races[kernel](shape, where)


def attention(shape: Shape, where: torch.device) -> Race:
    """Causal attention; each gets queries, keys and values [B, S, H, D] of all heads, as a projection leaves them."""
    q, k, v = (_random(where, shape.batch, shape.length, shape.heads, shape.head_dim) for _ in range(3))
    m = torch.arange(shape.length, dtype=torch.int32, device=where).expand(shape.batch, -1)
    seen = attention_op.intervals(torch.zeros_like(m), m + 1, shape.length)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, _ = attention_op.attention(q.transpose(1, 2).unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), seen)
        return o.squeeze(2).transpose(1, 2)

    def pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    flops = 2 * 2 * shape.batch * shape.heads * shape.head_dim * shape.length * (shape.length + 1) / 2
    race = Race(f"causal, {shape.heads} heads of {shape.head_dim}", flops, 3.5 * flops, "TFLOP/s")
    race.add(OURS, _trained(ours, q, k, v))
    race.add(TORCH, _trained(pytorch, q, k, v))
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 4", "flash_attn.cute")):
        race.add_installed(name, f"{module}:flash_attn_func", lambda f: _trained(partial(f, causal=True), q, k, v))
    return race


def linear_cross_entropy(shape: Shape, where: torch.device) -> Race:
    """The sum of the losses of all tokens, from the hidden states."""
    tokens = shape.tokens
    x, weight = _random(where, tokens, shape.hidden), _random(where, shape.vocabulary, shape.hidden)
    weight = weight / shape.hidden**0.5
    targets = torch.arange(tokens, device=where) % shape.vocabulary

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        lse, of_target = linear_cross_entropy_op.linear_cross_entropy(x, weight, targets)
        return linear_cross_entropy_op.losses(lse, of_target, targets, ignore=-100).sum()

    def pytorch(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.mT).float(), targets, reduction="sum")

    def liger(fused: Any) -> Contender:
        options = (None, None, -100, 0.0, 0.0, "sum")
        return _trained(lambda x, weight: fused.apply(x, weight, targets, *options)[0], x, weight)

    flops = 2.0 * tokens * shape.hidden * shape.vocabulary
    race = Race(f"{shape.vocabulary} ids of {shape.hidden}", flops, 3 * flops, "TFLOP/s")
    race.add(OURS, _trained(ours, x, weight))
    race.add(TORCH, _trained(pytorch, x, weight))
    race.add_installed(LIGER, "liger_kernel.ops:LigerFusedLinearCrossEntropyFunction", liger)
    return race


def norm(shape: Shape, where: torch.device) -> Race:
    """RMSNorm of the residual stream's sum, which is returned as well."""
    x, residual = (_random(where, shape.tokens, shape.hidden) for _ in range(2))
    weight = _random(where, shape.hidden)

    def pytorch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, (shape.hidden,), weight, EPS), summed

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm_op.rms_norm(x, residual, weight, EPS)

    leaves, moved = (x, residual, weight), x.nbytes
    # Two tensors in and two out; then two gradients and the sum in, and one gradient out.
    race = Race(f"RMSNorm + residual, {shape.hidden}", 4 * moved, 8 * moved, "GB/s")
    race.add(OURS, _trained(ours, *leaves))
    race.add(TORCH, _trained(pytorch, *leaves))
    race.add_installed(
        LIGER,
        "liger_kernel.ops:LigerFusedAddRMSNormFunction",
        lambda fused: _trained(lambda *leaves: fused.apply(*leaves, EPS), *leaves),
    )
    return race


def rotary(shape: Shape, where: torch.device) -> Race:
    """Queries and keys turned: ours in place in the packed projection, PyTorch as transformers does it."""
    size = shape.batch, shape.length, shape.heads, 3, shape.head_dim
    packed, gradient = _random(where, *size).flatten(2), _random(where, *size).flatten(2)
    q, k = (packed.view(size)[:, :, :, i].contiguous() for i in range(2))
    frequencies = 1e-4 ** torch.linspace(0, 1, shape.head_dim // 2, device=where)
    angles = torch.arange(shape.length, device=where)[:, None] * frequencies
    angles = angles.expand(shape.batch, 1, -1, -1).transpose(1, 2)
    cos, sin = angles.cos(), angles.sin()
    whole_cos, whole_sin = (torch.cat((x, x), -1).bfloat16() for x in (cos, sin))

    def forward() -> None:
        rotary_op.rotary_forward(packed, cos, sin, 3, 2)

    def both() -> None:
        forward()
        rotary_op.rotary_backward(gradient, cos, sin, 3, 2)

    def half_turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    def pytorch(*heads: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * whole_cos + half_turned(x) * whole_sin for x in heads)

    def liger(fused: Any) -> Contender:
        def turned(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            heads = fused.apply(q.transpose(1, 2), k.transpose(1, 2), whole_cos.squeeze(2), whole_sin.squeeze(2))
            return tuple(x.transpose(1, 2) for x in heads)

        return _trained(turned, q, k)

    moved = 2 * (q.nbytes + k.nbytes)
    race = Race(f"{shape.heads} queries and keys of {shape.head_dim}", moved, 2 * moved, "GB/s")
    result = rotary_op.rotate_(packed.clone(), cos, sin, 3, 2).view(size)[:, :, :, 0]
    race.add(OURS, Contender(forward, both, result))
    race.add(TORCH, _trained(pytorch, q, k))
    race.add_installed(LIGER, "liger_kernel.ops:LigerRopeFunction", liger)
    return race


def swiglu(shape: Shape, where: torch.device) -> Race:
    """Ours and PyTorch's from one projection of gate and up, Liger's from two."""
    gate_up = _random(where, shape.tokens, 2 * shape.intermediate)

    def pytorch(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    moved = gate_up.nbytes / 2
    # Two halves in and one out; then the gradient and both halves in, and two out. Ours writes the product again too.
    race = Race(f"2 x {shape.intermediate}", 3 * moved, 8 * moved, "GB/s")
    race.add(OURS, _trained(swiglu_op.swiglu, gate_up))
    race.add(TORCH, _trained(pytorch, gate_up))
    halves = (x.contiguous() for x in gate_up.chunk(2, -1))
    race.add_installed(LIGER, "liger_kernel.ops:LigerSiLUMulFunction", lambda fused: _trained(fused.apply, *halves))
    return race


def _trained(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Contender:
    """A function with the gradients of all its inputs. Only outputs that have one count; the first is the result."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    def forward() -> list[Tensor]:
        outputs = function(*leaves)
        every = outputs if isinstance(outputs, tuple) else (outputs,)
        return [output for output in every if output is not None and output.requires_grad]

    def both() -> None:
        torch.autograd.grad(forward(), leaves, given)

    outputs = forward()
    result = outputs[0].detach().clone()
    given = [torch.randn_like(output) for output in outputs]
    both()
    return Contender(forward, both, result)


def _random(where: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=where)
