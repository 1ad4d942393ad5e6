"""What NCCL demands of a program and gloo forgives: every collective of a rank is checked, and the ranks' are matched.

Design choices:
- A kernel in front of each c10d operation, at the dispatch key just above the backends: there everything that goes
  through a process group passes (torch.distributed and deepspeed.comm, functional collectives, DeviceMesh and DTensor,
  FSDP2, DDP's reducer in C++), of every group and every thread. A dispatch mode would see its own thread alone.
- One rank sees dtype, memory layout, device, reduction, a destroyed group, and objects pickled within a step: it raises
  at the call. Sizes and order take all ranks: each writes its calls to a file, before gloo runs them, so that they are
  there when gloo aborts or hangs; the pool matches them afterwards.
- Matching is a run of the calls one at a time: a call ends when all ranks of its communicator have come to the same one
  (operation, reduction or root, dtype, sizes). Where that gets stuck, NCCL may hang: two communicators used in other
  orders on two ranks, a call that one rank leaves out, other sizes. Two ranks are a communicator for each send and
  receive; batch_isend_irecv and all-to-all are many at once, as in NCCL.
- Not seen: what no process group carries (stores, DeepSpeed's own shared memory), backends called by themselves,
  streams and missing waits (gloo has none), and whether NCCL's buffers would have let a small send pass.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatrain import device

ROOT = Path(__file__).parents[2]

DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
"""ncclDataType in torch's NCCLUtils.hpp, without the formats that no NVIDIA GPU has. Bool travels as uint8."""

REDUCTIONS = {"SUM", "AVG", "PRODUCT", "MIN", "MAX", "PREMUL_SUM"}

OPERATIONS = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "allgather_": ("all_gather", "output_tensors"),
    "allgather_coalesced_": ("all_gather", "input_list"),
    "_allgather_base_": ("all_gather", "input_tensor"),
    "allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "output_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "outputs"),
    "gather_": ("gather", "input_tensors"),
    "scatter_": ("scatter", "output_tensors"),
    "barrier": ("barrier", ""),
}
"""c10d's collectives: the name here, and the argument whose sizes all ranks have to have in common."""

PAIRWISE = {"send", "recv_", "alltoall_", "alltoall_base_"}
MISSING = {"recv_any_source_": "receive from any rank", "monitored_barrier_": "monitored barrier"}
PICKLING = {name for name in dir(dist) if "_object" in name}
STEP = {"accumulate", "apply", "evaluate"}


class Call(NamedTuple):
    """A collective, or one side of a send. communicator: its group. ranks: those that take part, as the world counts.

    what: all that has to be the same on each of them, in words. line: who asked. batch: one number for what is issued
    as one.
    """

    communicator: str
    ranks: tuple[int, ...]
    what: str
    line: str
    batch: int

    def __str__(self) -> str:
        return f"{self.what} on {self.communicator} of ranks {' '.join(map(str, self.ranks))}"


class Checker:
    """The checks of one rank, and what it has called so far."""

    def __init__(self, path: Path) -> None:
        self.calls: list[Call] = []
        self.batch = 0
        self.in_batch = False
        self._lock = threading.Lock()
        self._file = path.open("w", buffering=1)

    def close(self) -> None:
        self._file.close()

    def check(self, name: str, arguments: dict[str, Any]) -> None:
        """Raises AssertionError for what NCCL hasn't, and notes the call."""
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        line, pickling = _asked_by()
        problem = pickling or _problem(name, group, arguments)
        assert problem is None, f"{name.strip('_')} at {line}: {problem}"
        with self._lock:
            if not self.in_batch:
                self.batch += 1
            for communicator, ranks, what in _describe(name, group, arguments):
                call = Call(communicator, ranks, what, line, self.batch)
                self.calls.append(call)
                self._file.write(json.dumps(call) + "\n")

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """What is called within is issued as one."""
        self.batch, self.in_batch = self.batch + 1, True
        try:
            yield
        finally:
            self.in_batch = False


checker: Checker | None = None
"""This rank's, during a task."""


@contextmanager
def checked(path: Path) -> Iterator[None]:
    """Checks this process's collectives within, and writes them to `path`."""
    global checker
    _put_in_front()
    checker = Checker(path)
    try:
        yield
    finally:
        checker.close()
        checker = None


@cache
def _put_in_front() -> torch.library.Library:
    """Puts the check in front of all c10d operations, for the life of the process."""
    library = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
    for name in [*OPERATIONS, *PAIRWISE, *MISSING]:
        library.impl(name, _kernel(name), "BackendSelect")  # type: ignore[no-untyped-call]
    issue = distributed_c10d.batch_isend_irecv

    def batch_isend_irecv(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        if checker is None:
            return issue(p2p_op_list)
        with checker.one_batch():
            return issue(p2p_op_list)

    dist.batch_isend_irecv = distributed_c10d.batch_isend_irecv = batch_isend_irecv
    return library


def _kernel(name: str) -> Callable[..., Any]:
    operation = getattr(torch.ops.c10d, name).default
    names = [argument.name for argument in operation._schema.arguments]

    def kernel(*values: Any) -> Any:
        if checker is not None:
            checker.check(name, dict(zip(names, values, strict=False)))  # Arguments left at their defaults are missing.
        # Unlike calling the kernel itself (torch.library.get_kernel), this lets go of the interpreter's lock, which
        # gloo's threads may ask for while they hold the lock that the kernel asks for.
        return operation._op_dk(torch._C.DispatchKey.CPU, *values)

    return kernel


def _problem(name: str, group: dist.ProcessGroup, arguments: dict[str, Any]) -> str | None:
    """What this rank alone can tell to be wrong."""
    if group not in distributed_c10d._world.pg_map:
        return "its group is destroyed"
    if name in MISSING:
        return f"NCCL has no {MISSING[name]}"
    if arguments.get("tag", 0) != 0:
        return "NCCL has no tags: messages between two ranks arrive in their order"
    if "reduce_op" in arguments and (reduction := _reduction(arguments)) not in REDUCTIONS:
        return f"NCCL has no reduction {reduction}"
    for tensor in [] if name == "barrier" else _tensors(arguments.values()):
        if tensor.device != device.device():
            return f"a tensor is on {tensor.device}, this rank's device is {device.device()}"
        if tensor.dtype not in DTYPES:
            return f"NCCL has no {tensor.dtype}"
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return f"a tensor isn't contiguous: shape {tuple(tensor.shape)}, strides {_strides(tensor)}"
    return None


def _describe(
    name: str, group: dist.ProcessGroup, arguments: dict[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Communicator, ranks and words of each call that the operation makes."""
    ranks = tuple(dist.get_process_group_ranks(group))
    described = "group" if group.group_desc == "undefined" else group.group_desc
    communicator = "the default group" if group is dist.group.WORLD else f"{described} {group.group_name}"
    if name in PAIRWISE:
        kind = "all_to_all" if name.startswith("alltoall") else "send"
        for source, target, size in _messages(name, group, arguments):
            if source != target and size:
                dtype = _dtypes(_tensors(arguments.values()))
                pair = ranks[source], ranks[target]
                yield communicator, tuple(sorted(pair)), f"{kind} {pair[0]} to {pair[1]} {dtype} {size}"
        return
    words, argument = OPERATIONS[name]
    if "reduce_op" in arguments:
        words += f" {_reduction(arguments).lower()}"
    if "root_rank" in arguments:
        words += f" root {ranks[arguments['root_rank']]}"
    if argument:
        tensors = _tensors([arguments[argument]])
        words += f" {_dtypes(tensors)} {'+'.join(str(tensor.numel()) for tensor in tensors)}"
    yield communicator, ranks, words


def _messages(name: str, group: dist.ProcessGroup, arguments: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Sender, receiver (as the group counts) and elements of what this rank sends and receives."""
    own = group.rank()
    if name == "send":
        yield own, arguments["dst"], arguments["tensors"][0].numel()
    elif name == "recv_":
        yield arguments["src"], own, arguments["tensors"][0].numel()
    else:
        for other in range(group.size()):
            yield own, other, _part(arguments, "input", other, group.size())
            yield other, own, _part(arguments, "output", other, group.size())


def _part(arguments: dict[str, Any], side: str, other: int, size: int) -> int:
    """Elements of an all-to-all to (input) or from (output) another rank."""
    if f"{side}_tensors" in arguments:
        return int(arguments[f"{side}_tensors"][other].numel())
    whole, splits = arguments[side], arguments[f"{side}_split_sizes"]
    return int(whole[0].numel() * splits[other]) if splits and len(whole) else int(whole.numel()) // size


def _reduction(arguments: dict[str, Any]) -> str:
    return str(dist.ReduceOp.RedOpType(arguments["reduce_op"].op()).name)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All of them, in lists of lists too."""
    nested = [_tensors(value) if isinstance(value, (list, tuple)) else [value] for value in values]
    return [value for part in nested for value in part if isinstance(value, Tensor)]


def _dtypes(tensors: list[Tensor]) -> str:
    return "+".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def _strides(tensor: Tensor) -> object:
    return tensor.stride() if tensor.layout == torch.strided else tensor.layout


PACKAGES = Path(torch.__file__).parents[1]
CARRIERS = tuple(
    f"{PACKAGES}{os.sep}{part}" for part in ("torch/", "deepspeed/comm/", "deepspeed/utils/", "typing_extensions.py")
)
"""What passes collectives on, and asks for none itself."""


@cache
def _place(file: str) -> tuple[str, bool] | None:
    """A file's name in a report and whether it is of this repository; None for one that only passes calls on."""
    # .venv may lie in the repository's root.
    if file.startswith(f"{ROOT}{os.sep}") and file != __file__ and "site-packages" not in file:
        return file.removeprefix(f"{ROOT}{os.sep}"), True
    if file.startswith(f"{PACKAGES}{os.sep}") and not file.startswith(CARRIERS):
        return file.removeprefix(f"{PACKAGES}{os.sep}"), False
    return None


def _asked_by() -> tuple[str, str | None]:
    """The line that asked, with this repository's line if a library stands between; and what's wrong with pickling.

    Objects are pickled with copies to and from the host, for which a step has no time.
    """
    line = ours = pickling = problem = None
    frame: FrameType | None = sys._getframe(3)
    while frame and (ours is None or (pickling and not problem)):
        name, place = frame.f_code.co_name, _place(frame.f_code.co_filename)
        if place is None:
            pickling = name if name in PICKLING else pickling
        else:
            file, is_ours = place
            line = line or f"{file}:{frame.f_lineno}"
            ours = ours or (f"{file}:{frame.f_lineno}" if is_ours else None)
            if pickling and name in STEP and file.startswith("megatrain/engines/"):
                problem = f"{pickling} pickles, within a step"
        frame = frame.f_back
    seen = dict.fromkeys(place for place in (line, ours) if place)
    return " from ".join(seen) or "a thread without Python", problem


def read(path: Path) -> list[Call]:
    """What a rank called; a line that it hadn't finished when it died is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Call(a, tuple(b), *rest) for a, b, *rest in (json.loads(line) for line in lines if line.endswith("\n"))]


def conflict(calls: list[list[Call]], complete: bool = True) -> str | None:
    """Where the ranks' calls, one list for each rank, don't match: a line for each rank that waits. None if all do.

    complete: all ranks ended well. If not, one that called nothing more proves nothing.
    """
    rows = [_batches(row) for row in calls]
    position = [0] * len(rows)
    pending = [list(row[0]) if row else [] for row in rows]
    moved = set(range(len(rows)))
    while moved:
        rank = moved.pop()
        for call in list(pending[rank]):
            sides = [_find(call, pending[other]) for other in call.ranks]
            if None in sides or call not in pending[rank]:
                continue
            for other, side in zip(call.ranks, sides, strict=True):
                assert side is not None
                pending[other].remove(side)
                if not pending[other] and position[other] + 1 < len(rows[other]):
                    position[other] += 1
                    pending[other] = list(rows[other][position[other]])
                moved.add(other)
    stuck = [rank for rank, left in enumerate(pending) if left]
    ended = {rank for other in stuck for call in pending[other] for rank in call.ranks} - set(stuck)
    if not stuck or (ended and not complete):
        return None
    lines = [f"  rank {rank} waits in {pending[rank][0]}, asked for at {pending[rank][0].line}" for rank in stuck]
    lines += [f"  rank {rank} calls nothing more" for rank in sorted(ended)]
    return "\n".join(["the ranks' collectives don't match, NCCL may hang:", *lines])


def _batches(calls: list[Call]) -> list[list[Call]]:
    """What is issued as one, in order."""
    batches: dict[int, list[Call]] = {}
    for call in calls:
        batches.setdefault(call.batch, []).append(call)
    return list(batches.values())


def _find(call: Call, pending: list[Call]) -> Call | None:
    """The call of another rank that is this one's counterpart."""
    return next((other for other in pending if other[:3] == call[:3]), None)
