"""A GPU that isn't there: tensors with a device, a shape and a dtype but no memory, and a host that counts its waits.

Design choices:
- The device is registered in torch's place for backends of others (privateuse1), so that megatrain.device takes it for
  an accelerator; FakeTensorMode runs every operation on it by shape alone, and raises where devices are mixed.
- Host is the other side of it. It sees each operation and keeps those for which the CUDA runtime would make the host
  wait: values and shapes that depend on data, boolean indices, copies that block or whose host side isn't pinned.
- Copies that don't block land late: their event is reached only by waiting for it. Reading what has not landed is an
  error, and so is writing to the pinned memory that a copy to the device is yet to read. What was read is 1, for there
  are no numbers.
- A process that did this is of no other use, and a misuse may abort it: `run` starts one for each function.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent
NAME = "fakegpu"
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def run(function: Callable[[], Any], timeout: float = 100.0) -> Any:
    """Calls `function`, importable by name, in a process of its own; its result, which travels as JSON."""
    command = [sys.executable, "-m", "tests.fake_gpu", function.__module__, function.__name__]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stdout}{ended.stderr}"
    return json.loads(ended.stdout.splitlines()[-1])


class Host(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The host's side of the fake GPU. waits: each operation that would have made it wait, and where it was asked for.

    waited_for: for each event that was waited for, how many were recorded after it, those that only time left out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.waited_for: list[int] = []
        self.events = 0
        # Tensors by their storage, which views share. They are kept, so that no other gets the same number.
        self.pinned: dict[int, Tensor] = {}
        self.in_flight: dict[int, Tensor] = {}
        self.leaving: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._check_not_leaving(func, args)
        if func is aten._pin_memory.default:
            copy = args[0].clone()
            self.pinned[_storage(copy)] = copy
            return copy
        if func is aten._local_scalar_dense.default and not _on_device(args[0]):
            return self._read(args[0])
        if func in COPIES:
            return self._copy(func, args, kwargs)
        if self._depends_on_data(func, args, kwargs):
            self._note(func)
        return func(*args, **kwargs)

    def _note(self, func: Any) -> None:
        self.waits.append(f"{func} at {_caller()}")

    def _read(self, tensor: Tensor) -> float | int | bool:
        if _storage(tensor) in self.in_flight:
            raise AssertionError(f"read before it has landed, at {_caller()}")
        kind = float if tensor.is_floating_point() else bool if tensor.dtype == torch.bool else int
        return kind(1)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        result: Tensor = func(*args, **kwargs)
        made = func is aten._to_copy.default
        source = args[0] if made else args[1]
        free = args[2:] == (True,) or kwargs.get("non_blocking", False)
        if _on_device(source) == _on_device(result):
            return result
        host = result if _on_device(source) else source
        if made and free and host is result:
            self.pinned[_storage(host)] = host  # As PyTorch makes it.
        if not free or _storage(host) not in self.pinned:
            self._note(func)
        elif host is result:
            self.in_flight[_storage(host)] = host
        else:
            self.leaving[_storage(host)] = host
        return result

    def _check_not_leaving(self, func: Any, args: Any) -> None:
        """What is still to be copied to the device the host may not write to; the device's own copies come in order."""
        if func is aten.copy_.default and _on_device(args[1]):
            return
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and _storage(value) in self.leaving:
                raise AssertionError(f"written to before its copy to the device is over, at {_caller()}")

    def _depends_on_data(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the host has to see values on the device to know what, or how much, comes out."""
        if func in INDEXED:
            # Indices on the host are copied there, and one that is a mask is counted first.
            asks = any(i is not None and (i.dtype == torch.bool or not _on_device(i)) for i in args[1])
            return asks and _on_device(args[0])
        return not DEPENDS_ON_DATA.isdisjoint(func.tags) and any(
            isinstance(leaf, Tensor) and _on_device(leaf) for leaf in tree_leaves((args, kwargs))
        )


class Event:
    """In place of torch.Event, on a device so slow that nothing has ever happened until it is waited for."""

    host: Host

    def __init__(self, _device: torch.device, *, enable_timing: bool = False) -> None:
        self.reached = False
        self.timing = enable_timing

    def record(self) -> None:
        self.copies = set(self.host.in_flight)
        self.sources = set(self.host.leaving)
        self.host.events += not self.timing
        self.number = self.host.events

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True
        self.host.waited_for.append(self.host.events - self.number)
        for copy in self.copies:
            self.host.in_flight.pop(copy, None)
        for source in self.sources:
            self.host.leaving.pop(source, None)


class Stream:
    """A queue of the device, in which nothing waits for anything: there is nothing to compute."""

    def __init__(self, **_: Any) -> None:
        pass

    def wait_stream(self, _other: Stream) -> None:
        """Orders the device's work, not the host's."""

    def wait_event(self, _event: Any) -> None:
        """The same."""

    def record_event(self) -> StreamEvent:
        return StreamEvent()


class StreamEvent:
    """An event between streams, for which the host has no reason to wait."""

    def record(self) -> None:
        """Marks nothing."""


class Backend(_DummyBackendModule):
    """What FSDP2 asks of a device's module in torch (as torch.cuda is)."""

    Stream = Stream
    Event = StreamEvent

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Asked by activation checkpointing."""
        return [torch.bfloat16]

    def current_stream(self) -> object:
        return Stream()

    @contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        yield


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _caller() -> str:
    """The line of this repository that asked for the operation."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
    # .venv may lie in the repository's root.
    ours = (f for f in reversed(frames) if f.filename != __file__ and "site-packages" not in f.filename)
    frame = next(ours)
    return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"


def start(ranks: int, rank: int = 0) -> None:
    """Registers the device, and makes this process one of `ranks` whose collectives cost nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    torch.Event = Event  # type: ignore[assignment, misc]
    dist.init_process_group(f"cpu:fake,{NAME}:fake", rank=rank, world_size=ranks, store=FakeStore())


@contextmanager
def tensors() -> Iterator[tuple[FakeTensorMode, Host]]:
    """Every tensor made within is fake.

    Call `start` first, and make what has to be real before: a mesh, and the module on the meta device that FSDP shards.
    """
    host = Event.host = Host()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, host:
        yield mode, host


if __name__ == "__main__":
    module, name = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), name)()), flush=True)
    os._exit(0)  # No teardown of a device that isn't there.
