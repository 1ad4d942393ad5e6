"""What the operations check before a kernel runs: it reads memory by the sizes that it is told."""

from __future__ import annotations

import torch
from torch import Tensor


def require_dtype(operation: str, *tensors: Tensor | None) -> None:
    """Raises TypeError where a tensor isn't fp32 or bf16: kernels compute in fp32, which fp64 mustn't become unseen."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{operation} has no kernel for {tensor.dtype}; legal: torch.float32, torch.bfloat16")


def require_shape(operation: str, name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raises ValueError where a tensor (if there is one) has another shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{operation}: {name} is {list(tensor.shape)}, has to be {list(shape)}")
