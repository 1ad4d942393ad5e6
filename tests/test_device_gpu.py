"""What only a GPU can show: copies that don't block, NCCL, the numbers of a GPU, the same bits twice."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatrain import device
from megatrain.batch import Batch
from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, FsdpShard, Precision
from tests import reference, samples
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, Curve, train_from_start

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

STEPS = 20
AT_ONCE_SECONDS = 0.1


@pytest.fixture
def busy() -> Iterator[Tensor]:
    """A GPU with about a second or more of work queued; the tensor is made by the last of it, and holds 8192s."""
    ones = torch.ones(8192, 8192, device=device.device())
    product = ones @ ones  # Loads what the first call loads.
    device.copy_to_host({"x": ones[0]}).wait()
    for _ in range(60):
        torch.matmul(ones, ones, out=product)
    yield product
    device.copy_to_host({"x": product[0]}).wait()


def test_a_copy_to_the_host_lands_late(busy: Tensor) -> None:
    began = time.perf_counter()
    pending = device.copy_to_host({"row": busy[0]})
    busy.zero_()
    assert not pending.ready()
    assert time.perf_counter() - began < AT_ONCE_SECONDS
    row = pending.wait()["row"]
    assert pending.ready()
    assert row.is_pinned()
    assert row.eq(8192).all()


def test_a_batch_goes_to_the_device_without_waiting_for_it(busy: Tensor) -> None:
    batch = samples.batch(samples=64, sequence_length=2048, seed=0).map(device.pin_memory)
    assert batch.input_ids.is_pinned()
    began = time.perf_counter()
    there = batch.to(busy.device)
    assert time.perf_counter() - began < AT_ONCE_SECONDS
    assert torch.equal(there.input_ids.cpu(), batch.input_ids)


def test_a_gpu_has_an_architecture_and_a_name() -> None:
    assert re.fullmatch(r"sm_\d+|gfx\w+", device.architecture() or "")
    assert device.name() != "CPU"


def test_events_measure_time(busy: Tensor) -> None:
    began = device.event(timing=True)
    torch.matmul(busy, busy)
    ended = device.event(timing=True)
    assert began is not None
    assert ended is not None
    ended.synchronize()
    assert 0.1 < began.elapsed_time(ended) < 10_000


def test_peak_memory_is_that_since_the_last_call() -> None:
    device.peak_memory()
    torch.zeros(1 << 26, dtype=torch.uint8, device=device.device())
    assert device.peak_memory() >= 1 << 26
    assert device.peak_memory() < 1 << 26


def group() -> tuple[str, bool, str, int]:
    numbers = torch.tensor(7, device=device.device())
    dist.all_reduce(numbers)
    bound = dist.distributed_c10d._get_default_group().bound_device_id
    return dist.get_backend(), bound == device.device(), str(device.device()), int(numbers)


def test_nccl_is_bound_to_the_device(pool: Pool) -> None:
    assert pool.run(group, ranks=1) == [("nccl", True, "cuda:0", 7)]


def batches(size: int, sequence_length: int) -> list[Batch]:
    return [samples.batch(size, sequence_length, seed=step) for step in range(STEPS)]


@cache
def on_the_cpu() -> reference.Result:
    rates = [LEARNING_RATE] * STEPS
    return reference.train(samples.MODEL, samples.OPTIM, batches(7, 32), rates, 7, Precision.fp64, seed=0)


@pytest.mark.parametrize(
    ("engine", "bound"),
    [
        (DeepSpeedConfig(zero_stage=0), 1e-12),
        (DeepSpeedConfig(zero_stage=1), 1e-6),
        (DeepSpeedConfig(zero_stage=2), 1e-6),
        (DeepSpeedConfig(zero_stage=3), 1e-6),
        (DeepSpeedConfig(zero_stage=3, offload_optimizer=True), 1e-6),
        (FsdpConfig(shard=FsdpShard.full), 1e-12),
        (FsdpConfig(shard=FsdpShard.gradient), 1e-12),
    ],
)
def test_the_numbers_are_those_of_the_reference_on_the_cpu(pool: Pool, engine: EngineConfig, bound: float) -> None:
    """In float64, where devices differ by the order of their sums alone; ZeRO's masters are fp32."""
    (curve,) = pool.run(
        train_from_start,
        ranks=1,
        timeout=110.0,
        engine=engine,
        precision=Precision.fp64,
        batches=batches(7, 32),
        micro_batch_size=2,
    )
    assert reference.difference(curve.losses, on_the_cpu().losses) <= bound
    assert reference.difference(curve.gradient_norms, on_the_cpu().gradient_norms) <= bound


def train_deterministically() -> tuple[Curve, Curve]:
    device.set_deterministic()
    first, second = (
        train_from_start(DeepSpeedConfig(zero_stage=1), Precision.bf16, batches(8, 512), micro_batch_size=4)
        for _ in range(2)
    )
    return first, second


def test_deterministic_gives_the_same_bits() -> None:
    """In a process that has not computed yet: cuBLAS reads its workspace setting once."""
    pool = Pool()
    try:
        ((first, second),) = pool.run(train_deterministically, ranks=1, timeout=110.0)
    finally:
        pool.close()
    assert first == second
