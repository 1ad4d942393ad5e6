"""What one layer of Llama costs the memory of a GPU, forward and backward, counted without one: megatrain's, those of
transformers and torchtitan (benchmarks/block_peers.py).

    python -m benchmarks.block [--model llama_7b] [--sequence-length 4096] [--peers DIR]

Design choices:
- Tensors are fake: they have shapes and no memory, so nothing is measured, and the figures are exact and the same on
  any machine. They say how much a GPU has to move, not how fast it does.
- An operation counts for what it is given and what it returns, once each. What a kernel reads twice or keeps between
  its own launches isn't seen, of no contender. A view costs nothing, nor does memory that isn't written (empty).
  What is changed in place is read and written. Of a broadcast tensor only the elements that there are count.
- What is dispatched has to be what a GPU would be given. The CPU's attention is one operation with the inputs and
  outputs of CUDA's; RMSNorm, which the CPU would take apart, is registered as the one operation that CUDA has.
- Matrix products are mm, addmm and bmm. Attention isn't: it is in both figures.
- Gradients are asked for of the input and of every parameter, and none is added to an older one.
- Saved is what autograd keeps from forward to backward: whole storages, each once, without parameters and without
  what all layers share. The layer's input is another layer's output, and left out too; a last row has it where it is
  kept (transformers' keeps a copy in fp32 instead, which is its own).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.block_peers import DTYPE, OURS, TRANSFORMERS, Make, contenders
from benchmarks.common import Bar, Result, Row, main
from megatrain.compose import compose
from megatrain.config import ModelConfig, TrainConfig

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
UNWRITTEN = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
FUSED_ON_CUDA = (aten._fused_rms_norm.default, aten._fused_rms_norm_backward.default)
MOST_TRAFFIC, MOST_SAVED = 0.6, 0.7
"""Of transformers': the bytes that are no matrix product's, and those that are saved."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations dispatched within, and the bytes that each has to read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Any] = Counter()
        self.bytes: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = _tensors((args, kwargs))
        known = {_storage(tensor) for tensor in read}
        written = [tensor for tensor in _tensors(result) if _storage(tensor) not in known]
        arguments = zip(func._schema.arguments, args, strict=False)
        written += [given for argument, given in arguments if argument.alias_info and argument.alias_info.is_write]
        if written and func not in UNWRITTEN:
            self.calls[func] += 1
            self.bytes[func] += sum(map(_addressed, read + written))
        return result


@dataclass(frozen=True)
class Cost:
    """Of a pass and its backward. saved: bytes kept between them; saved_with_input: with those of the layer's input."""

    traffic: Traffic
    saved: int
    saved_with_input: int

    @property
    def bytes(self) -> int:
        return self.traffic.bytes.total()

    @property
    def bytes_without_products(self) -> int:
        return self.bytes - sum(self.traffic.bytes[product] for product in PRODUCTS)


QUANTITIES: dict[str, Callable[[Cost], float]] = {
    "operations": lambda each: each.traffic.calls.total(),
    "GB read and written": lambda each: each.bytes / 1e9,
    "GB without products": lambda each: each.bytes_without_products / 1e9,
    "GB saved": lambda each: each.saved / 1e9,
    "GB saved, and the input": lambda each: each.saved_with_input / 1e9,
}


def cost(make: Make, config: ModelConfig, length: int) -> Cost:
    """Of one sequence of `length` tokens."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor
        return tensor

    with FakeTensorMode(), as_on_cuda():
        block = make(config, length)
        x = torch.empty(1, length, config.hidden_size, dtype=DTYPE, requires_grad=True)
        gradient = torch.empty_like(x)
        parameters = list(block.module.parameters())
        with Traffic() as traffic:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                y = block.forward(x)
            torch.autograd.grad(y, [x, *parameters], gradient)
        for tensor in (*parameters, *block.shared):
            kept.pop(_storage(tensor), None)
        with_input = _bytes(kept.values())
        kept.pop(_storage(x), None)
        return Cost(traffic, _bytes(kept.values()), with_input)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Operations that PyTorch has for CUDA alone are dispatched as one, as there."""
    library = torch.library.Library("aten", "IMPL", "CPU")  # type: ignore[no-untyped-call]
    for operation in FUSED_ON_CUDA:
        library.impl(operation, decomposition_table[operation])  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _addressed(tensor: Tensor) -> int:
    """Bytes of the elements, those that it repeats counted once."""
    count = tensor.itemsize
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each quantity and contender."""
    config = compose("train", [f"model={arguments.model}", "run_dir=none", "max_steps=1"])
    assert isinstance(config, TrainConfig)
    makes = contenders(arguments.peers)
    costs = {name: cost(make, config.model, arguments.sequence_length) for name, make in makes.items()}
    base, own = costs[TRANSFORMERS], costs[OURS]
    rows: list[Row] = [
        {"what": what, "contender": name, "amount": round(of(each), 3), "ratio": round(of(each) / of(base), 3)}
        for what, of in QUANTITIES.items()
        for name, each in costs.items()
    ]
    traffic = base.bytes_without_products / own.bytes_without_products
    bars = [
        Bar("bytes without matrix products, transformers' over ours", traffic, 1 / MOST_TRAFFIC),
        Bar("bytes saved, transformers' over ours", base.saved / own.saved, 1 / MOST_SAVED),
    ]
    return Result(rows, bars)


if __name__ == "__main__":
    title = "A layer in bf16, forward and backward, one sequence"
    sys.exit(main(title, measure, model="llama_7b", sequence_length=4096, peers="build/peers"))
