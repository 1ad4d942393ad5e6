"""What every operation of kernels/ has to hold in: fake tensors, torch.compile, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megatrain.kernels.verify.case import Case

Call = Callable[..., tuple[Tensor, ...]]


def results(case: Case, call: Call, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then gradients of their sum."""
    leaves = {name: tensor.detach().requires_grad_(name in case.differentiated) for name, tensor in inputs.items()}
    outputs = call(*leaves.values())
    wanted = [leaves[name] for name in case.differentiated]
    return [*outputs, *torch.autograd.grad([o.sum() for o in outputs], wanted)]


def check_everywhere(case: Case) -> None:
    """Asserts the same bits compiled and checkpointed, and the same shapes, dtypes and strides of fake tensors."""
    inputs = dict(case.inputs)
    expected = results(case, case.operation, inputs)
    with FakeTensorMode() as mode:
        fakes = results(case, case.operation, {name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
    described = [(t.shape, t.dtype, t.stride()) for t in expected]
    assert [(t.shape, t.dtype, t.stride()) for t in fakes] == described

    torch.compiler.reset()
    compiled = results(case, torch.compile(case.operation, backend="aot_eager", fullgraph=True), inputs)

    def checkpointed(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = checkpoint(case.operation, *tensors, use_reentrant=False)
        return outputs

    for other in (compiled, results(case, checkpointed, inputs)):
        for a, b in zip(expected, other, strict=True):
            assert torch.equal(a, b)
