"""Training steps on a fake GPU: nothing lies on the wrong device, and the host never waits for the device.

Trainer, hooks, metrics, engines, model and optimizer are the real ones, and so is FSDP2. In place of DeepSpeed, which
needs a device that computes, stand autograd and the optimizer alone.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatrain import device, optimizer
from megatrain.batch import Batch
from megatrain.checkpoint.background import BackgroundSaver
from megatrain.checkpoint.snapshot import Snapshot
from megatrain.config import (
    ActivationCheckpointing,
    AttentionKernel,
    DeepSpeedConfig,
    EngineConfig,
    EvaluationConfig,
    FsdpConfig,
    FsdpShard,
    Kernel,
    KernelsConfig,
    LossKernel,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from megatrain.data.loader import RankBatch
from megatrain.engines.checksums import checksums
from megatrain.engines.ranges import MASTER, Shard
from megatrain.model.choice import TORCH
from megatrain.model.transformer import Transformer
from megatrain.observe.events import SkipSink
from megatrain.observe.metrics import LAG, MetricStream
from megatrain.observe.pace import ComputeTimer
from megatrain.observe.sinks import JsonlSink
from megatrain.parallel import mesh as meshes
from megatrain.parallel.mesh import Mesh
from megatrain.resilience.anomalies import Anomalies
from megatrain.resilience.progress import Progress
from megatrain.resilience_config import AnomaliesConfig
from megatrain.train import chunks
from megatrain.trainer import Trainer
from tests import fake_gpu, samples

RANKS = 16
STEPS = 5
PRECISIONS = (Precision.bf16, Precision.fp32)
ENGINES: dict[str, EngineConfig] = {
    # Weights stay whole: nothing that DeepSpeed cuts is missing.
    "zero1": DeepSpeedConfig(zero_stage=1),
    "fsdp-full": FsdpConfig(shard=FsdpShard.full),
    "fsdp-gradient": FsdpConfig(shard=FsdpShard.gradient),
}
LAYOUTS = {
    "dp": ParallelConfig(),
    # Two ranks to a key-value head.
    "tp-1f1b": ParallelConfig(tensor=4, pipeline=2),
    "tp-interleaved": ParallelConfig(tensor=2, pipeline=2, virtual_stages=2, schedule="interleaved_1f1b"),
    "replicate": ParallelConfig(replicate=2),
    "triton": ParallelConfig(),
}
RECOMPUTED = "tp-interleaved"
KERNELS = {
    "triton": KernelsConfig(AttentionKernel.triton, Kernel.triton, Kernel.triton, Kernel.triton, LossKernel.triton)
}
"""PyTorch's own in the other layouts."""
MODEL = replace(samples.MODEL, num_layers=4)
RUNS = [
    f"{engine} {precision.value} {layout}"
    for engine in ENGINES
    for layout in LAYOUTS
    for precision in (PRECISIONS if layout == "dp" else PRECISIONS[:1])
    if layout != "replicate" or engine.startswith("fsdp")
]
PIPELINED = [run for run in RUNS if "tp-1f1b" in run]
CASES = [*(("first", run) for run in RUNS), *(("last", run) for run in PIPELINED)]
"""A rank, and what it trains: the last one has the last stage of pipelines."""


class PlainDeepSpeed(nn.Module):
    """What DeepSpeedEngine asks of DeepSpeed, without DeepSpeed."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.module = model
        self.optimizer = optimizer
        self.seq_data_parallel_group = torch.distributed.group.WORLD

    def forward(self, *batch: Tensor) -> Tensor:
        losses: Tensor = self.module(*batch)
        return losses

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        """Gradients are reduced by the adapter."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def first() -> dict[str, Any]:
    """What the first rank did."""
    return train(0, RUNS)


def last() -> dict[str, Any]:
    """What the last rank did."""
    return train(RANKS - 1, PIPELINED)


def train(rank: int, runs: list[str]) -> dict[str, Any]:
    """Trains STEPS steps in each of `runs`, evaluating after every second one: what was done, written, waited for."""
    fake_gpu.start(RANKS, rank)
    # Before any other tensor is fake.
    meshes_of = {name: meshes.build(parallel, MODEL.num_kv_heads) for name, parallel in LAYOUTS.items()}
    found = {}
    for run in runs:
        engine, precision, layout = run.split()
        found[run] = train_in(ENGINES[engine], Precision(precision), layout, meshes_of[layout])
    return found


def train_in(engine: EngineConfig, precision: Precision, layout: str, mesh: Mesh) -> dict[str, Any]:
    recompute = ActivationCheckpointing.full if layout == RECOMPUTED else ActivationCheckpointing.none
    parallel = LAYOUTS[layout]
    model = chunks(
        TrainConfig(model=MODEL, parallel=parallel, activation_checkpointing=recompute),
        mesh,
        KERNELS.get(layout, TORCH),
    )
    real = samples.batch(samples=4, sequence_length=32, seed=0)
    with fake_gpu.tensors() as (mode, host), tempfile.TemporaryDirectory() as folder:
        # As the loader gives them: in pinned memory, micro-batches being views of the step's.
        batch = real.map(mode.from_tensor).map(device.pin_memory)
        micro_batches = [samples.rows(batch, first, first + 2) for first in (0, 2)]
        trainer = make_trainer(engine, precision, model, Path(folder), mesh, micro_batches)
        for step in range(STEPS):
            trainer.train_step(RankBatch(micro_batches, digest=(1 << 63) + step, first=0, last=63), began=0.0)
            trainer.after_step()
            dict(checksums(trainer.engine.alike()))
        waited_for = list(host.waited_for)
        trainer.metrics.close()
        weights = [weight for chunk in model for weight in chunk.parameters()]
        return {
            "waits": host.waits,
            "waited_for": waited_for,
            "records": [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()],
            "weights": sorted({f"{weight.dtype} on {weight.device}" for weight in weights}),
        }


def make_trainer(
    chosen: EngineConfig,
    precision: Precision,
    model: list[Transformer],
    folder: Path,
    mesh: Mesh,
    held_out: list[Batch],
) -> Trainer:
    """A trainer as train.build joins it, without what loads, saves and stops."""
    # Here, for it takes seconds and only the subprocess needs it; engines first, which says what DeepSpeed runs on.
    from megatrain.engines import select  # isort: skip
    import deepspeed

    config = TrainConfig(
        run_dir=str(folder),
        max_steps=STEPS,
        sequence_length=32,
        model=MODEL,
        engine=chosen,
        evaluation=EvaluationConfig(every=2),
    )
    deepspeed.initialize = lambda model, optimizer, config, mpu: (PlainDeepSpeed(model, optimizer), config, mpu)
    engine = select.make(chosen, precision, 2, config.optim.gradient_clip, sources=2)
    engine.build(model, mesh, partial(optimizer.build, config.optim, config.model))
    progress = Progress()
    ComputeTimer(next(iter(model[0].layers.values())).get_submodule("mlp.gate_up"), progress.meter, progress)
    absent: Any = None
    anomalies = Anomalies(AnomaliesConfig(window=1), LAG)
    # So that later steps have limits: what is read of the fake device says of each that it was skipped.
    anomalies.restore({"good": [(1, 1.0, 1.0)], "bad": [], "since": 1, "rollbacks": 0})
    return Trainer(
        config=config,
        device=device.device(),
        mesh=mesh,
        engine=engine,
        loader=absent,
        metrics=MetricStream([JsonlSink(folder / "metrics.jsonl", 0), SkipSink(anomalies, None)]),
        saver=BackgroundSaver(absent, config.saving, Progress(), Progress()),
        stopping=absent,
        events=None,
        held_out=lambda: iter(held_out),
        kept_state={},
        anomalies=anomalies,
        open_metrics=absent,
        progress=progress,
    )


@cache
def runs(rank: str) -> Any:
    return fake_gpu.run({"first": first, "last": last}[rank])


@pytest.mark.parametrize(("rank", "run"), CASES)
def test_the_host_never_waits_for_the_device(rank: str, run: str) -> None:
    assert runs(rank)[run]["waits"] == []


@pytest.mark.parametrize(("rank", "run"), CASES)
def test_all_is_trained_on_the_device(rank: str, run: str) -> None:
    """FSDP's weights are its masters between steps."""
    dtype = "torch.bfloat16" if run.startswith("zero1 bf16") else "torch.float32"
    assert runs(rank)[run]["weights"] == [f"{dtype} on fakegpu:0"]


@pytest.mark.parametrize(("rank", "run"), CASES)
def test_metrics_arrive_late_and_in_order(rank: str, run: str) -> None:
    """The device does nothing until it is waited for, and only for what lies LAG records back."""
    found = runs(rank)[run]
    held_out = STEPS // 2
    assert found["waited_for"] == [LAG] * (STEPS + held_out - LAG)
    assert [(r["step"], "held_out_loss" in r) for r in found["records"]] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
        (5, False),
    ]
    assert all(r["loss"] == 1.0 for r in found["records"] if "loss" in r)


WAITING: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": ("aten._local_scalar_dense.default", lambda x: x.sum().item()),
    "if": ("aten._local_scalar_dense.default", lambda x: 1 if x[0] > 0 else 0),
    "cpu": ("aten._to_copy.default", lambda x: x.cpu()),
    "copy to pageable memory": ("aten.copy_.default", lambda x: torch.ones(3).copy_(x, non_blocking=True)),
    "copy from pageable memory": ("aten._to_copy.default", lambda x: torch.ones(3).to(x.device, non_blocking=True)),
    "mask": ("aten.index.Tensor", lambda x: x[x > 0]),
    "assignment to a mask": ("aten.index_put_.default", lambda x: x.__setitem__(x > 0, x.new_ones(2))),
    "index on the host": ("aten.index.Tensor", lambda x: x[torch.arange(2)]),
    "masked_select": ("aten.masked_select.default", lambda x: x.masked_select(x > 0)),
    "nonzero": ("aten.nonzero.default", lambda x: x.nonzero()),
    "equal": ("aten.equal.default", lambda x: torch.equal(x, x)),
}
"""What makes the host wait, and the operation in which it does."""


def freely(x: Tensor) -> None:
    """What may stand on the training path."""
    host = torch.ones(3).pin_memory()
    x.copy_(host, non_blocking=True)
    y = torch.where(x > 0, x, 0.0).masked_fill(x > 1, 2.0)[torch.arange(2, device=x.device)]
    host[:2].copy_(y, non_blocking=True)
    y.to("cpu", non_blocking=True)
    torch.full_like(y, 3.0).clamp_(min=1).float()


def reuse(x: Tensor, wait: bool = False) -> None:
    """Fills a pinned buffer again that was copied to the device without blocking."""
    buffer = torch.ones(3).pin_memory()
    x.copy_(buffer, non_blocking=True)
    event = torch.Event(x.device)
    event.record()
    if wait:
        event.synchronize()
    buffer.fill_(2.0)


def save(x: Tensor, early: bool = False) -> None:
    """Takes the copy that a save writes, then trains on; a thread would read it."""
    snapshot = Snapshot()
    snapshot.take([Shard("w", (3,), ((0, 3),), {MASTER: x})])
    x.fill_(2.0)
    (shard,) = snapshot._shards if early else snapshot.shards()
    shard.tensors[MASTER][0].item()


def count() -> dict[str, Any]:
    """The waits of each of WAITING, and what mixed devices and reading too early raise."""
    fake_gpu.start(1)
    found = {name: waits_of(function) for name, (_, function) in WAITING.items()}
    return {
        "waiting": found,
        "free": waits_of(freely),
        "mixed": error_of(lambda x: x + torch.ones(3)),
        "early": error_of(lambda x: x.to("cpu", non_blocking=True)[0].item()),
        "reused": error_of(reuse),
        "reused later": error_of(partial(reuse, wait=True)),
        "save": [*waits_of(save), error_of(save)],
        "save read early": error_of(partial(save, early=True)),
    }


def waits_of(function: Callable[[Tensor], object]) -> list[str]:
    with fake_gpu.tensors() as (_, host), contextlib.suppress(RuntimeError):
        function(torch.ones(3, device=device.device()))
    return [wait.split()[0] for wait in host.waits]


def error_of(function: Callable[[Tensor], object]) -> str:
    try:
        with fake_gpu.tensors():
            function(torch.ones(3, device=device.device()))
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def counted() -> Any:
    return fake_gpu.run(count)


@pytest.mark.parametrize("name", WAITING)
def test_the_counter_sees(counted: Any, name: str) -> None:
    assert counted["waiting"][name] == [WAITING[name][0]]


def test_the_counter_lets_pass_what_costs_nothing(counted: Any) -> None:
    assert counted["free"] == []


def test_mixed_devices_and_early_reads_raise(counted: Any) -> None:
    assert "same device" in counted["mixed"]
    assert "before it has landed" in counted["early"]


def test_pinned_memory_is_not_reused_while_it_is_copied(counted: Any) -> None:
    assert "before its copy to the device is over" in counted["reused"]
    assert counted["reused later"] == "nothing"


def test_a_save_copies_without_a_wait_and_is_read_when_the_copy_has_landed(counted: Any) -> None:
    assert counted["save"] == ["nothing"]
    assert "before it has landed" in counted["save read early"]
