"""Tasks on a Ray cluster: an existing one, or one of this machine that is started for it.

Design choices:
- Ray only places attempts: they are counted and repeated here, as for the other executors. Ray's own retries are off.
- Few more tasks are submitted than there are CPUs, so that a cluster that grows on demand does, and a task that failed
  doesn't wait behind all others.
- The connection stays for the life of the process, for starting Ray takes seconds; Ray ends it at exit.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, TypeVar

from megatrain.data_prep.execute.config import ExecuteConfig
from megatrain.data_prep.execute.tasks import Attempts, Failure, WorkerDiedError, attempt, outcome, prepare_process
from megatrain.errors import InputError, bad_value

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT = 2
"""Tasks submitted for each CPU of the cluster."""
OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Of a local cluster: tasks and results are small."""
ANSWER_SECONDS = 10.0
"""For an address to answer; Ray itself tries for minutes."""


def each_on_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], config: ExecuteConfig
) -> Generator[tuple[int, Result | Failure], None, None]:
    """As megatrain.data_prep.execute.each, on the cluster at config.ray_address."""
    ray = connect(config)
    from ray.exceptions import RayError

    remote = ray.remote(num_cpus=1, max_retries=0)(_attempt)
    stored = ray.put(function)
    most = config.workers or IN_FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1)))
    attempts = Attempts(range(len(tasks)), config.retries)
    running: dict[Any, int] = {}

    def submit() -> bool:
        while attempts.waiting and len(running) < most:
            number = attempts.waiting.popleft()
            running[remote.remote(stored, tasks[number], config.worker_memory_bytes)] = number
        return bool(running)

    try:
        while submit():
            (reference,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(reference)
            try:
                result, error = outcome(ray.get(reference))
            except RayError as lost:
                error = WorkerDiedError(number, f"its Ray worker was lost ({type(lost).__name__})")
            failure = None if error is None else attempts.failed(number, error)
            submit()  # so that the cluster works while the result is used
            if error is None:
                yield number, result
            elif failure is not None:
                yield number, failure
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _attempt(function: Callable[[Any], Any], task: object, memory_bytes: int | None) -> bytes:
    """What runs on the cluster."""
    prepare_process(memory_bytes)
    return attempt(function, task)


def connect(config: ExecuteConfig) -> Any:
    """The module `ray`, connected; started first where no address is given. Raises InputError."""
    try:
        import aiohttp  # noqa: F401  (without it Ray's workers fail now and then)
        import ray
    except ImportError as error:
        raise InputError(f"executor=ray: {error}; pip install 'megatrain[ray]'") from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the answer to a warning about GPUs
    init = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    if config.ray_address is None:
        cpus = config.workers or len(os.sched_getaffinity(0))
        init("local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
        return ray
    _check_answers(config.ray_address)
    try:
        init(config.ray_address)
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        legal = f"Ray can't connect ({why}); a cluster that wants a token needs RAY_AUTH_MODE=token"
        raise bad_value("ray_address", config.ray_address, legal) from None
    return ray


def _check_answers(address: str) -> None:
    """Raises InputError unless something listens at HOST:PORT."""
    if address == "auto":
        return
    found = re.fullmatch(r"([^:/]+):(\d+)", address)
    if not found:
        raise bad_value("ray_address", address, "HOST:PORT of a cluster's head, or auto")
    try:
        socket.create_connection((found[1], int(found[2])), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise bad_value("ray_address", address, f"no Ray cluster answers there ({error})") from None
