"""One function over many tasks, by the processes of a machine, a Ray cluster or Slurm jobs.

Design choices:
- The three differ in where a task runs and in nothing else: the same function, the same retries, the same Failure.
- Tasks are idempotent: they leave results in files, atomically, and one that finds its results there is done at once.
  So a task may be tried twice, even at the same time on a machine that was thought lost, and what is returned is small.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

from megatrain.data_prep.execute.config import ExecuteConfig, Executor, check
from megatrain.data_prep.execute.tasks import Failure

__all__ = ["ExecuteConfig", "Executor", "Failure", "each", "ready"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def ready(config: ExecuteConfig, folder: Path) -> None:
    """Raises InputError if the executor can't be had; for a start's checks, before anything is written."""
    check(config)
    if config.executor is Executor.ray:
        from megatrain.data_prep.execute.ray_cluster import connect

        connect(config)
    if config.executor is Executor.slurm:
        from megatrain.data_prep.execute.slurm import Cluster

        Cluster(folder, config.slurm)


def each(
    function: Callable[[Task], Result], tasks: Sequence[Task], config: ExecuteConfig, folder: Path
) -> Generator[tuple[int, Result | Failure], None, None]:
    """function(task) of each task: its number and its result or Failure, in the order in which they end.

    function, tasks and results pickle, `function` is found by its name on all machines, and paths are absolute. folder:
    for what the executor has to keep (slurm: requests, journals and logs), the same at each start of a run, on a file
    system that all machines share. Nothing starts before the first result is asked for, and what is under way ends with
    the iterator: close it, or read it to its end.

    Raises what a task raised if it is a MegatrainError (disk full), InputError if the executor can't be had, and GaveUp
    if it is lost.
    """
    if config.executor is Executor.ray:
        from megatrain.data_prep.execute.ray_cluster import each_on_ray

        return each_on_ray(function, tasks, config)
    if config.executor is Executor.slurm:
        from megatrain.data_prep.execute.slurm import each_on_slurm

        return each_on_slurm(function, tasks, config, folder)
    from megatrain.data_prep.execute.pool import each_in_pool

    return each_in_pool(function, tasks, config.workers, config.retries, config.worker_memory_bytes)
