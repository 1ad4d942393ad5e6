"""What can't be had is one line, before anything starts."""

import sys
from pathlib import Path

import pytest

from megatrain.data_prep.execute import ExecuteConfig, Executor, each, ready
from megatrain.data_prep.execute.config import SlurmConfig, check
from megatrain.errors import InputError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExecuteConfig(workers=0), "workers=0: at least 1"),
        (ExecuteConfig(retries=-1), "retries=-1: at least 0"),
        (ExecuteConfig(worker_memory_bytes=1), "worker_memory_bytes=1: at least 134217728"),
        (ExecuteConfig(slurm=SlurmConfig(tasks=0)), "slurm.tasks=0: at least 1"),
        (ExecuteConfig(slurm=SlurmConfig(cpus_per_task=0)), "slurm.cpus_per_task=0: at least 1"),
        (ExecuteConfig(ray_address="auto"), "ray_address=auto: needs executor=ray"),
    ],
)
def test_values_are_checked(config: ExecuteConfig, message: str) -> None:
    with pytest.raises(InputError) as refused:
        check(config)
    assert str(refused.value) == message


def refused_by_both(config: ExecuteConfig, folder: Path) -> str:
    """The error of `ready`, which is that of starting to work too."""
    with pytest.raises(InputError) as refused:
        ready(config, folder)
    with pytest.raises(InputError) as later:
        next(each(abs, [-1], config, folder))
    assert str(refused.value) == str(later.value)
    return str(refused.value)


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "executor=slurm: sbatch isn't there; start it on a machine of a Slurm cluster"
    assert refused_by_both(ExecuteConfig(executor=Executor.slurm), tmp_path) == message


def test_no_ray_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    message = "executor=ray: import of aiohttp halted; None in sys.modules; pip install 'megatrain[ray]'"
    assert refused_by_both(ExecuteConfig(executor=Executor.ray), tmp_path) == message


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there ([Errno 111] Connection refused)"),
        ("ray://head:10001", "HOST:PORT of a cluster's head, or auto"),
    ],
)
def test_no_ray_there(address: str, why: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    message = f"ray_address={address}: {why}"
    assert refused_by_both(ExecuteConfig(executor=Executor.ray, ray_address=address), tmp_path) == message
