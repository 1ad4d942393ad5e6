"""A kernel's outputs and gradients against fp64, and what it did to the memory around its tensors; on any device.

Design choices:
- Inputs lie between bands of NaN, and what an operation allocates starts as NaN: what is read beyond a tensor's edge or
  never written shows in the result, what is written there in the bands.
- A bound needs no tuning: in fp32 one number, in bf16 what PyTorch's own bf16 has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatrain.device import CPU
from megatrain.kernels.verify.case import Case

BAND = 64
"""Elements of NaN before and after a tensor; a multiple of what alignment needs."""

FP32_BOUND = 1e-6
"""The relative L2 error to fp64 that a kernel may have in fp32."""


class KernelError(Exception):
    """A kernel did what it mustn't, or its numbers are too far off."""


class Banded:
    """Memory for a tensor of the same shape, strides and dtype: all NaN (of integers the least), with a band around it.

    where: the device, by default the tensor's.
    """

    def __init__(self, like: Tensor, where: torch.device | None = None) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        poison = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).min
        self.storage = torch.full((extent + 2 * BAND,), poison, dtype=like.dtype, device=where or like.device)
        self.tensor = self.storage.as_strided(like.shape, like.stride(), BAND)
        self.before = self.storage.clone()

    def intact(self) -> bool:
        """Whether nothing but the tensor has changed: not the bands, nor what lies between rows that are apart."""
        self.before.as_strided(self.tensor.shape, self.tensor.stride(), BAND).copy_(self.tensor)
        return torch.equal(self.storage.view(torch.uint8), self.before.view(torch.uint8))


@contextmanager
def banded_allocations() -> Iterator[None]:
    """Within it what PyTorch allocates unfilled, an operation's outputs, is Banded.

    Raises KernelError at the end where a band was written.
    """
    made: list[Banded] = []

    def banded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_banded(*arguments: Any, **named: Any) -> Tensor:
            empty = allocate(*arguments, **named)
            if empty.numel() == 0:
                return empty
            made.append(Banded(empty))
            return made[-1].tensor

        return allocate_banded

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, banded(original))
        yield
    if not all(memory.intact() for memory in made):
        raise KernelError("memory around an output was written")


@dataclass(frozen=True)
class Measured:
    """Relative L2 errors to fp64 of one output or gradient.

    kernel: of the kernel. eager: of the reference in the same dtype. least: of the truth rounded to that dtype.
    all_fp32: whether no input is of a narrower dtype. independent: how many rounding errors there are.
    """

    kernel: float
    eager: float
    least: float
    all_fp32: bool
    independent: int

    @property
    def bound(self) -> float:
        """What the kernel may have: 1e-6 where all is fp32; with bf16, what eager has.

        Eager and kernel round at different places, so of n errors either's sum is the larger by chance, by about
        1 / sqrt(n) of it; twice that is allowed.
        """
        if self.all_fp32:
            return FP32_BOUND
        chance: float = 2 * self.independent**-0.5
        return max(FP32_BOUND, (1 + chance) * max(self.eager, self.least))


def relative(a: Tensor, b: Tensor) -> float:
    """The L2 norm of a - b over that of b, in fp64; 0 where both are empty or 0."""
    exact = b.detach().double()
    difference = float((a.detach().double() - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0


def run_banded(case: Case, where: torch.device = CPU) -> dict[str, Tensor]:
    """Outputs ("0", "1") and gradients (by input's name) of a case's operation, whose inputs are Banded.

    Raises KernelError where a band was written.
    """
    banded = {name: Banded(tensor, where) for name, tensor in case.inputs.items()}
    for name, tensor in case.inputs.items():
        banded[name].tensor.copy_(tensor)
    result = run(case, case.operation, {name: memory.tensor for name, memory in banded.items()})
    for name, memory in banded.items():
        if not memory.intact():
            raise KernelError(f"memory around {name} was written")
    return result


def compare(case: Case, runs: Sequence[Mapping[str, Tensor]], where: torch.device = CPU) -> dict[str, Measured]:
    """The errors of a case's first run.

    Raises KernelError where one is above its bound, or where another run has other bits.
    """
    inputs = {name: tensor.to(where) for name, tensor in case.inputs.items()}
    truth = run(case, case.reference, {name: _as_fp64(tensor) for name, tensor in inputs.items()})
    eager = run(case, case.reference, inputs)
    all_fp32 = all(tensor.dtype in (torch.float32, torch.int32) for tensor in inputs.values())
    result = {}
    for name, value in runs[0].items():
        if not all(torch.equal(_bits(value), _bits(again[name])) for again in runs[1:]):
            raise KernelError(f"{name} has other bits when run again")
        least = relative(truth[name].to(value.dtype), truth[name])
        errors = relative(value, truth[name]), relative(eager[name], truth[name]), least
        result[name] = Measured(*errors, all_fp32, max(1, value.numel() // case.shared))
        if not result[name].kernel <= result[name].bound:  # NaN is no error that is small
            raise KernelError(f"{name} is off by {result[name].kernel:.2e}, above {result[name].bound:.2e}")
    return result


def run(case: Case, function: Callable[..., tuple[Tensor, ...]], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of one of a case's functions, for gradients of the outputs that are the same each time."""
    leaves = {name: tensor.detach() for name, tensor in inputs.items()}
    for name in case.differentiated:
        leaves[name].requires_grad_()
    outputs = function(*leaves.values())
    result = {str(i): output.detach() for i, output in enumerate(outputs)}
    floating = [output for output in outputs if output.requires_grad]
    random = torch.Generator().manual_seed(0)
    # In bf16's values, so that every dtype gets the same.
    given = [torch.randn(o.shape, generator=random).bfloat16().to(o.device, o.dtype) for o in floating]
    wanted = [leaves[name] for name in case.differentiated]
    if floating and wanted:
        result |= dict(zip(case.differentiated, torch.autograd.grad(floating, wanted, given), strict=True))
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _as_fp64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
