"""Triton's interpreter made strict: what a kernel does to memory, and its numbers against fp64. For tests only.

The interpreter runs a kernel's programs one after another in numpy (TRITON_INTERPRET=1 before triton is imported).

Design choices:
- Its bf16 is wrong in silence (triton issue 11584): products of raw bits, truncation. Here tl.dot multiplies what the
  bits mean, casts round to nearest even, and any other arithmetic in bf16 is an error: a kernel casts to fp32 first.
- Every address is looked at. Outside the tensors of the launch, twice written, or written by one program and touched by
  another is an error; so are atomics. A GPU runs programs in any order at once, so the last is a race, which running
  them in order would hide.
- Inputs lie between bands (measure.py), what an operation allocates doesn't: addresses in it are checked one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from megatrain.kernels.verify.case import Case, Work
from megatrain.kernels.verify.measure import KernelError, Measured, compare, run_banded

Original = Callable[..., Any]
"""What a function of the interpreter was before it was replaced."""


class Memory:
    """The tensors of one launch, and which program touched which element.

    An element is known by its first byte, whose number is its place when all storages of the launch are laid end to
    end. written, read: by that number the program (from 1) that did, 0 for none, -1 for several readers.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self.starts = np.array(sorted(storages), dtype=np.uint64)
        sizes = np.array([storages[int(start)] for start in self.starts], dtype=np.uint64)
        self.stops = self.starts + sizes
        self.offsets = np.cumsum(sizes, dtype=np.uint64) - sizes
        total = int(sizes.sum())
        self.written = np.zeros(total, dtype=np.int32)
        self.read = np.zeros(total, dtype=np.int32)
        self.work = Work()

    def places(self, pointers: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.int64]:
        """The numbers of the elements that aren't masked."""
        used = pointers[mask]
        which = np.searchsorted(self.starts, used, side="right") - 1
        if (which < 0).any() or (used >= self.stops[which]).any():
            raise KernelError("an address outside the tensors of the launch")
        result: NDArray[np.int64] = (used - self.starts[which] + self.offsets[which]).astype(np.int64)
        return result

    def load(self, places: NDArray[np.int64], program: int, itemsize: int) -> None:
        """Notes that `program` reads."""
        if ((self.written[places] != 0) & (self.written[places] != program)).any():
            raise KernelError("a race: a program reads what another writes in the same launch")
        first = len(np.unique(places[self.read[places] == 0]))
        self.work += Work(read=itemsize * first, again=itemsize * (len(places) - first))
        others = (self.read[places] != 0) & (self.read[places] != program)
        self.read[places] = np.where(others, -1, program)

    def store(self, places: NDArray[np.int64], program: int, itemsize: int) -> None:
        """Notes that `program` writes."""
        if self.written[places].any() or len(np.unique(places)) < len(places):
            raise KernelError("a double write: an element is written twice in a launch")
        if ((self.read[places] != 0) & (self.read[places] != program)).any():
            raise KernelError("a race: a program writes what another reads in the same launch")
        self.written[places] = program
        self.work += Work(written=itemsize * len(places))


def bf16_to_fp32(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The values of bf16 bits (uint16)."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Rounds to nearest even, as a GPU does; the bits, uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _cast(self: Any, source: Any, to: Any, original: Original) -> Any:
    before, after = source.dtype.scalar, to.scalar
    if tl.bfloat16 not in (before, after) or before == after:
        return original(self, source, to)
    if before == tl.bfloat16 and after == tl.float32:
        return TensorHandle(bf16_to_fp32(source.data), after)
    if after == tl.bfloat16 and before == tl.float32:
        return TensorHandle(fp32_to_bf16(source.data), after)
    raise KernelError(f"a cast from {before} to {after}: go by fp32")


def _product(self: Any, a: Any, b: Any, accumulator: Any, *options: Any, original: Original) -> Any:
    if a.dtype.scalar != tl.bfloat16:
        return original(self, a, b, accumulator, *options)
    product = np.matmul(bf16_to_fp32(a.data), bf16_to_fp32(b.data))
    return TensorHandle(product.astype(accumulator.data.dtype) + accumulator.data, accumulator.dtype.scalar)


def _no_bf16(self: Any, *arguments: Any, original: Original) -> Any:
    for argument in arguments:
        if isinstance(argument, TensorHandle) and argument.dtype.scalar == tl.bfloat16:
            raise KernelError("arithmetic in bf16: cast to fp32 first")
    return original(self, *arguments)


def _no_bf16_sum(self: Any, values: Any, original: Original) -> Any:
    for value in values if isinstance(values, tuple) else (values,):
        if value.dtype == tl.bfloat16:
            raise KernelError("a reduction in bf16: cast to fp32 first")
    return original(self, values)


def _no_atomics(self: Any, *arguments: Any, original: Original) -> Any:  # noqa: ARG001
    raise KernelError("an atomic operation: its order, and so the result, would change from run to run")


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    """The tensors among a launch's arguments."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from tensors_of(argument)


class Watch:
    """What the interpreter's functions are replaced by; `memory` is that of the launch under way, `work` of each."""

    def __init__(self) -> None:
        self.memory = Memory([])
        self.work: list[Work] = []

    def launch(self, executor: Any, *arguments: Any, original: Original, **named: Any) -> None:
        """A launch begins."""
        self.memory = Memory(list(tensors_of((*arguments, *named.values()))))
        original(executor, *arguments, **named)
        self.work.append(self.memory.work)

    def load(self, builder: Any, pointers: Any, mask: Any, *rest: Any, original: Original, **named: Any) -> Any:
        """A masked load, which every load becomes."""
        self.memory.load(self.memory.places(pointers.data, _mask(mask)), _program(builder), _itemsize(pointers))
        return original(builder, pointers, mask, *rest, **named)

    def store(
        self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, original: Original, **named: Any
    ) -> Any:
        """A masked store, which every store becomes."""
        self.memory.store(self.memory.places(pointers.data, _mask(mask)), _program(builder), _itemsize(pointers))
        return original(builder, pointers, value, mask, *rest, **named)

    def dot(self, builder: Any, a: Any, b: Any, *rest: Any, original: Original) -> Any:
        """A matrix product."""
        self.memory.work += Work(products=2 * a.data.size * b.data.shape[1])
        return _product(builder, a, b, *rest, original=original)

    def unary(self, builder: Any, value: Any, function: Any, original: Original) -> Any:
        """A function of one argument."""
        if function in (np.exp, np.exp2):
            self.memory.work += Work(exponentials=value.data.size)
        return _no_bf16(builder, value, function, original=original)


def _mask(mask: Any) -> NDArray[Any]:
    return np.asarray(mask.data, dtype=bool)


def _itemsize(pointers: Any) -> int:
    return int(pointers.get_element_ty().primitive_bitwidth) // 8


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    _, height, depth = builder.grid_dim
    return int((x * height + y) * depth + z + 1)


ARITHMETIC = ("binary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf", "create_fp_to_fp")


@contextmanager
def watch() -> Iterator[Watch]:
    """Within it the interpreter is strict. Raises RuntimeError where triton was imported to compile.

    What a kernel does wrong raises triton's InterpreterError, whose text has the KernelError.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the interpreter is off: set TRITON_INTERPRET=1 before triton is imported")
    watching = Watch()
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (interpreter.GridExecutor, "__call__", watching.launch),
        (InterpreterBuilder, "create_masked_load", watching.load),
        (InterpreterBuilder, "create_masked_store", watching.store),
        (InterpreterBuilder, "cast_impl", _cast),
        (InterpreterBuilder, "create_dot", watching.dot),
        (InterpreterBuilder, "unary_op", watching.unary),
        *((InterpreterBuilder, name, _no_bf16) for name in ARITHMETIC),
        *((InterpreterBuilder, name, _no_atomics) for name in ("create_atomic_rmw", "create_atomic_cas")),
        (interpreter.ReduceOps, "apply", _no_bf16_sum),
        (interpreter.ScanOps, "apply", _no_bf16_sum),
    ]
    with ExitStack() as stack:
        for owner, name, by in replaced:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, partialmethod(_call, by, original))
        yield watching


def _call(self: Any, function: Callable[..., Any], original: Original, *arguments: Any, **named: Any) -> Any:
    return function(self, *arguments, original=original, **named)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it memory that PyTorch allocates starts as NaN (the largest integer), so that results show its use."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def check(case: Case) -> dict[str, Measured]:
    """Runs a case twice under watch(). The errors of its outputs ("0", "1") and gradients (by input's name).

    Raises KernelError where an error is above its bound, where a band was touched, or where the second run has other
    bits. What `watch` finds is raised as it says.
    """
    with watch() as watching, poisoned():
        runs = [run_banded(case), run_banded(case)]
    if not watching.work:
        raise KernelError("no kernel was launched")
    return compare(case, runs)
