"""One pool of ranks for the whole test run: real processes over gloo that outlive a test.

Design choices:
- Starting a rank (importing torch and deepspeed) costs seconds, a process group milliseconds: so processes are kept and
  every task gets a fresh group of the ranks it asks for.
- A task is a function of the test module by name; its arguments and results travel by pickle.
- A hang becomes a stack: each rank dumps its threads at the task's deadline and dies; a failure on one rank ends the
  others a moment later. The pool starts new ranks for the next task.
- What gloo does and NCCL wouldn't is a failure too (checking.py), in every task.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import gc
import importlib
import inspect
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.distributed import checking

START_SECONDS = 240.0
"""How long new ranks may take to import torch and deepspeed; no task's time."""

GRACE_SECONDS = 5.0
"""How long the other ranks may still take once one has failed."""


class RankFailedError(AssertionError):
    """A rank raised, died or ran out of time; the message has its traceback."""


class Pool:
    """Ranks that are started when first asked for."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], ranks: int, timeout: float = 60.0, **arguments: Any) -> list[Any]:
        """Runs `function(**arguments)` on `ranks` ranks at once; their results, in order of rank.

        The function is importable by name. Raises RankFailedError, with the traceback of the rank that failed first, or
        with the collectives that don't match.
        """
        self._start(ranks)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / str(rank) for rank in range(ranks)]
            task = (function.__module__, function.__qualname__, arguments, ranks, _free_port(), timeout)
            for (_, connection), path in zip(self._ranks, paths, strict=False):
                connection.send((*task, path))
            try:
                results, failures = self._collect(ranks, time.monotonic() + timeout + GRACE_SECONDS)
            except BaseException:
                self.close()
                raise
            if failures:
                self.close()  # Before their files are read: a rank may be writing still.
            mismatch = checking.conflict([checking.read(path) for path in paths], complete=not failures)
        if failures or mismatch:
            raise RankFailedError("\n".join([*failures, *([mismatch] if mismatch else [])]))
        return results

    def _collect(self, ranks: int, deadline: float) -> tuple[list[Any], list[str]]:
        """The results and the failures."""
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks[:ranks])}
        while waiting and time.monotonic() < deadline:
            for ready in wait(list(waiting), timeout=0.2):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                try:
                    failed, results[rank] = ready.recv()
                except EOFError:
                    failed, results[rank] = True, "died (its stacks are in the captured stderr if it ran out of time)"
                if failed:
                    failures.append(f"rank {rank}: {results[rank]}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        failures += [f"rank {rank}: gave no answer" for rank in waiting.values()]
        return [results.get(rank) for rank in range(ranks)], failures

    def _start(self, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        first = len(self._ranks)
        for rank in range(first, ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        deadline = time.monotonic() + START_SECONDS
        for rank, (_, connection) in enumerate(self._ranks[first:], first):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise RankFailedError(f"rank {rank}: not started within {START_SECONDS:g} s")
            connection.recv()

    def close(self) -> None:
        """Ends all ranks."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, connection: Connection) -> None:
    """The life of a rank."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    importlib.import_module("megatrain.engines.deepspeed")
    torch.set_num_threads(1)
    gc.freeze()  # What is there now stays: `_release` need not look at it each time.
    connection.send("ready")
    while True:
        try:
            module, name, arguments, ranks, port, timeout, path = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, exit=True, file=2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            with _process_group(timeout), checking.checked(path):
                function = importlib.import_module(module)
                for part in name.split("."):
                    function = getattr(function, part)
                answer = (False, function(**arguments))  # type: ignore[operator]
        except BaseException:
            answer = (True, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


@contextlib.contextmanager
def _process_group(timeout: float) -> Iterator[None]:
    """The task's own process group. DeepSpeed caches groups in module globals, which are put back afterwards."""
    import deepspeed.comm.comm
    import deepspeed.utils.groups
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    from megatrain import device

    modules = (deepspeed.comm.comm, deepspeed.utils.groups)
    saved = [{k: copy.copy(v) for k, v in vars(module).items() if _is_cache(v)} for module in modules]
    # ZeRO-3 counts modules and parameters for the life of the process and wants ranks to agree on the numbers.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    device.start(timeout)
    try:
        yield
        _release()
        device.finish()
        gc.collect()
    finally:
        for module, values in zip(modules, saved, strict=True):
            vars(module).update(values)


def _release() -> None:
    """Lets go of all that holds process groups: each of gloo's has threads of its own, which never rest."""
    import deepspeed
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_sharding_prop_cache

    for engine in [each for each in gc.get_objects() if isinstance(each, deepspeed.DeepSpeedEngine) and vars(each)]:
        engine.destroy()
        # Hooks of autograd's nodes, which the garbage collector can't see, hold the optimizer, which holds the nodes.
        for each in (engine.optimizer, engine):
            vars(each).clear()
    # A cache of the class, below a decorator that hides it.
    released = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(released).nonlocals["func"].cache_clear()
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    _clear_fast_path_sharding_prop_cache()  # type: ignore[no-untyped-call]


def _is_cache(value: object) -> bool:
    return value is None or isinstance(value, (dict, list, int))
