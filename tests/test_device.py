"""The device module on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatrain import device
from tests.distributed.pool import Pool

pytestmark = pytest.mark.skipif(device.accelerator() is not None, reason="needs a machine with only its CPU")


def test_a_machine_with_only_its_cpu() -> None:
    assert device.accelerator() is None
    assert device.count() == 0
    assert device.device() == torch.device("cpu")
    assert device.backend() == "gloo"


def test_the_launcher_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device.local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.local_rank() == 3


def test_memory_of_the_cpu_needs_no_pinning() -> None:
    tensor = torch.arange(3)
    assert device.pin_memory(tensor) is tensor


def test_a_copy_to_the_host_is_there_at_once_and_is_a_copy() -> None:
    source = torch.tensor([1.5, 2.5], requires_grad=True)
    pending = device.copy_to_host({"x": source, "n": torch.tensor(1 << 62)})
    with torch.no_grad():
        source.zero_()
    assert pending.ready()
    landed = pending.wait()
    assert landed["x"].tolist() == [1.5, 2.5]
    assert not landed["x"].requires_grad
    assert landed["n"].item() == 1 << 62


def test_the_cpu_has_no_peak_to_tell() -> None:
    held = torch.zeros(1 << 20)
    device.empty_cache()
    assert device.peak_memory() == 0
    assert held.numel() == 1 << 20


def test_the_cpu_runs_a_few_programs() -> None:
    assert device.processors(device.CPU) == 4
    assert device.warps(256, device.CPU) == 8


def test_kernels_are_compiled_for_no_cpu() -> None:
    assert device.architecture() is None
    assert device.name() == "CPU"


def test_deterministic_refuses_what_has_no_deterministic_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        device.set_deterministic()
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)


def group() -> tuple[str, str, list[int]]:
    """As a task of the pool, which starts by device.start."""
    numbers = torch.arange(2, device=device.device()) + dist.get_rank()
    dist.all_reduce(numbers)
    return dist.get_backend(), str(device.device()), numbers.tolist()


def test_start_joins_the_group_of_the_environment(pool: Pool) -> None:
    assert pool.run(group, ranks=2) == [("gloo", "cpu", [1, 3])] * 2


def test_finish_leaves_it_and_may_be_called_again(pool: Pool) -> None:
    assert pool.run(leave, ranks=2) == [False, False]


def leave() -> bool:
    device.finish()
    device.finish()
    return dist.is_initialized()
