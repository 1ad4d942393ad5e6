"""The configuration of who does the work. Only types, and the checks that need nothing but the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from megatrain.errors import bad_value

LEAST_MEMORY = 128 * 1024 * 1024
"""Bytes; Arrow and a tokenizer take most of them."""


class Executor(Enum):
    """Who runs the tasks; the results don't depend on it."""

    pool = "pool"
    """Processes of this machine."""
    ray = "ray"
    """A Ray cluster."""
    slurm = "slurm"
    """Arrays of Slurm jobs."""


@dataclass
class SlurmConfig:
    """The job array of executor=slurm. Values are sbatch's; null: the cluster's default."""

    tasks: int = 64
    """Jobs of the array, at most; each does its share of the work. More than the cluster's MaxArraySize become several
    arrays."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    time: str | None = None
    """sbatch --time, e.g. 4:00:00. What a job hasn't done by then is submitted again."""
    cpus_per_task: int = 1
    """sbatch --cpus-per-task: CPUs of a job."""
    memory: str | None = None
    """sbatch --mem, e.g. 8G."""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, e.g. ["--qos=low", "--constraint=cpu"]."""


@dataclass
class ExecuteConfig:
    """Who does the work, and what happens to a task that fails."""

    executor: Executor = Executor.pool
    """pool: processes of this machine; ray: a Ray cluster; slurm: arrays of Slurm jobs."""
    workers: int | None = None
    """Tasks done at once: on this machine (pool), on the cluster (ray), in each job (slurm). null: one for each CPU
    that there is, under slurm of slurm.cpus_per_task."""
    retries: int = 2
    """How often a task that failed, or whose process or machine was lost, is tried again."""
    worker_memory_bytes: int | None = None
    """Memory that a worker may allocate after its start (RLIMIT_DATA); a task that wants more fails. null: no limit."""
    ray_address: str | None = None
    """HOST:PORT of a Ray cluster, or auto: the one this machine belongs to; null: one is started on this machine.
    The environment says what Ray is to be told besides, e.g. RAY_AUTH_MODE=token."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def check(config: ExecuteConfig) -> None:
    """Raises InputError for a value that can't be had."""
    if config.workers is not None and config.workers < 1:
        raise bad_value("workers", config.workers, "at least 1")
    if config.retries < 0:
        raise bad_value("retries", config.retries, "at least 0")
    if config.worker_memory_bytes is not None and config.worker_memory_bytes < LEAST_MEMORY:
        raise bad_value("worker_memory_bytes", config.worker_memory_bytes, f"at least {LEAST_MEMORY}")
    if config.slurm.tasks < 1:
        raise bad_value("slurm.tasks", config.slurm.tasks, "at least 1")
    if config.slurm.cpus_per_task < 1:
        raise bad_value("slurm.cpus_per_task", config.slurm.cpus_per_task, "at least 1")
    if config.ray_address is not None and config.executor is not Executor.ray:
        raise bad_value("ray_address", config.ray_address, "needs executor=ray")
