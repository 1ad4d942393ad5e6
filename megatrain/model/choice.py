"""Which kernels a model computes with: what `kernels.NAME` ask for, on the device that is there.

Design choices:
- auto takes only what is known to be right: on a GPU flash-attn, or a Triton kernel that was verified on such a GPU
  (kernels/stamps.py); else PyTorch's own. On the CPU always PyTorch's own.
- What is asked for by name is what runs, or it is an error (law 5).
- The answer is a configuration without auto, and a sentence for each choice that says why.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version

from megatrain import device
from megatrain.config import AttentionKernel, Kernel, KernelsConfig, LossKernel, ModelConfig, Precision
from megatrain.errors import bad_value
from megatrain.kernels import stamps
from megatrain.kernels.attention import configs, flash
from megatrain.kernels.attention.op import MAX_HEAD_DIM
from megatrain.model.spec import head_dim

TORCH = KernelsConfig(AttentionKernel.torch, Kernel.torch, Kernel.torch, Kernel.torch, LossKernel.torch)
"""What is everywhere."""


@dataclass(frozen=True)
class Chosen:
    """kernels: without auto. reasons: by the name of a kernel, "triton: it was verified on sm_90"."""

    kernels: KernelsConfig
    reasons: dict[str, str]


def choose(asked: KernelsConfig, model: ModelConfig, precision: Precision) -> Chosen:
    """What this device computes with. Raises InputError where a kernel that is asked for can't run here."""
    kernels, reasons = KernelsConfig(), {}
    for field in fields(KernelsConfig):
        given = getattr(asked, field.name)
        name, reason = _choose(field.name, given.value, model, precision)
        setattr(kernels, field.name, type(given)(name))
        reasons[field.name] = f"{name}: {reason}"
    return Chosen(kernels, reasons)


def _choose(kernel: str, given: str, model: ModelConfig, precision: Precision) -> tuple[str, str]:
    """The name of what runs, and why."""
    architecture = device.architecture()
    if given in ("torch", "chunked"):
        return given, "as asked"
    if given == "auto" and device.accelerator() is None:
        return "torch", "there is no GPU"
    why_not = []
    if kernel == "attention" and given in ("auto", "flash"):
        obstacle = flash.out_of_reach(architecture, device.DTYPES[precision.value], head_dim(model))
        if obstacle is None:
            return "flash", "as asked" if given == "flash" else f"it is installed: {flash.version()}"
        if given == "flash":
            raise bad_value("kernels.attention", "flash", f"{obstacle}; legal: auto, triton, torch")
        why_not.append(f"flash: {obstacle}")
    obstacle = _obstacle(kernel, model, precision, architecture)
    if given == "triton":
        if obstacle is not None:
            raise bad_value(f"kernels.{kernel}", "triton", f"{obstacle}; legal: auto, torch")
        return "triton", "as asked"
    obstacle = obstacle or stamps.missing(kernel, str(architecture))
    if obstacle is None:
        return "triton", "; ".join([*why_not, f"it was verified on {architecture}"])
    return "torch", "; ".join([*why_not, f"triton: {obstacle}"])


def _obstacle(kernel: str, model: ModelConfig, precision: Precision, architecture: str | None) -> str | None:
    """Why Triton's kernel can't run here, if so."""
    if precision is Precision.fp64:
        return "kernels compute in fp32, which precision=fp64 isn't"
    if _triton() is None:
        return "triton isn't installed"
    size = head_dim(model)
    if kernel == "attention" and (size % 8 or size > MAX_HEAD_DIM):
        return f"model.head_dim is {size}, and has to be a multiple of 8 up to {MAX_HEAD_DIM}"
    if architecture is None:
        return (
            None if os.environ.get("TRITON_INTERPRET") == "1" else "it needs a GPU, or TRITON_INTERPRET=1 to be tried"
        )
    if kernel == "attention" and architecture not in configs.ARCHITECTURES:
        return f"this GPU is {architecture}, the kernel is for {', '.join(configs.ARCHITECTURES)}"
    if kernel == "attention" and _triton() != configs.TRITON:
        return f"triton {_triton()} is installed, the kernel's tiles are for {configs.TRITON}"
    return None


def _triton() -> str | None:
    """The version that is installed. Imports nothing."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
