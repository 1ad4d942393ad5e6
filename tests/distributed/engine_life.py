"""The life of two engines on one rank of the pool, and what is seen of it: the tasks of test_engine.py.

One engine lives through all that may disturb it (evaluations, skipped steps, NaNs, batches without targets, going back
to an earlier state); beside it another, the control, only trains. Both have to end with the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.batch import IGNORE, Batch, Stats
from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, FsdpShard, ModelConfig, Precision
from megatrain.engines import deepspeed as deepspeed_engine
from megatrain.engines.deepspeed import DeepSpeedEngine
from megatrain.engines.ranges import MASTER
from megatrain.model import spec
from megatrain.model.initialization import InitialWeights
from tests import samples
from tests.distributed.training import LEARNING_RATE, AnyEngine, Curve, make_engine, micro_batches, train
from tests.engines.states import WholeState, resident_bytes, same, snapshot, weights_follow_masters, whole

RANKS = 2
MICRO_BATCH = 2
EARLY, LATE = slice(0, 2), slice(2, 4)

MODEL = ModelConfig(
    name="odd",
    vocab_size=131,
    hidden_size=33,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    intermediate_size=37,
    attention_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    initializer_std=0.05,
)
"""Odd sizes, biases and a tied head: every kind of padding and of ranges that end within a parameter."""

PARAMETERS = spec.parameter_count(MODEL)


@dataclass(frozen=True)
class Layout:
    """stage: of ZeRO; or how FSDP shards."""

    stage: int | FsdpShard
    precision: Precision
    offload: bool = False

    def __str__(self) -> str:
        engine = f"fsdp-{self.stage.value}" if isinstance(self.stage, FsdpShard) else f"zero{self.stage}"
        return f"{engine}-{self.precision.name}{'-offload' * self.offload}"

    def engine(self) -> EngineConfig:
        """Small buckets, so that there are several of them and parameters larger than one."""
        if isinstance(self.stage, FsdpShard):
            return FsdpConfig(shard=self.stage)
        return DeepSpeedConfig(
            zero_stage=self.stage,
            offload_optimizer=self.offload,
            bucket_elements=1500,
            prefetch_elements=3000,
            max_live_elements=6000,
            persistence_elements=100,
        )


DEEPSPEED_LAYOUTS = [
    Layout(0, Precision.fp32),
    Layout(1, Precision.fp32),
    Layout(1, Precision.fp32, offload=True),
    Layout(2, Precision.fp32),
    Layout(3, Precision.fp32),
    Layout(3, Precision.fp32, offload=True),
    Layout(1, Precision.bf16),
    Layout(2, Precision.bf16),
    Layout(2, Precision.bf16, offload=True),
    Layout(3, Precision.bf16),
    Layout(3, Precision.bf16, offload=True),
]

LAYOUTS = [
    *DEEPSPEED_LAYOUTS,
    Layout(FsdpShard.full, Precision.fp32),
    Layout(FsdpShard.full, Precision.bf16),
    Layout(FsdpShard.gradient, Precision.fp32),
    Layout(FsdpShard.gradient, Precision.bf16),
]


def batches() -> list[Batch]:
    return [samples.batch(samples=7, sequence_length=16, seed=step) for step in range(4)]


def count(batch: Batch) -> Tensor:
    return (batch.targets != IGNORE).sum()


@contextmanager
def zero_settings(**settings: Any) -> Iterator[None]:
    """Engines made within it have these settings too in the zero_optimization part of DeepSpeed's configuration."""
    original = deepspeed_engine.json_config

    def changed(*arguments: Any) -> dict[str, Any]:
        generated = original(*arguments)
        generated["zero_optimization"] |= settings
        return generated

    with mock.patch.object(deepspeed_engine, "json_config", changed):
        yield


def make(layout: Layout, **settings: Any) -> AnyEngine:
    # A rank's part of a 7B model has several sub-groups; this gives a small one several too.
    several = {"sub_group_size": 4000} if layout.stage == 3 else {}
    with zero_settings(**several, **settings):
        return make_engine(layout.engine(), layout.precision, MICRO_BATCH, MODEL)


def accumulate(engine: AnyEngine, batch: Batch) -> Stats:
    return engine.accumulate(micro_batches(batch, MICRO_BATCH, engine.mesh), count(batch))


def evaluate(engine: AnyEngine, batch: Batch) -> float:
    return float(engine.evaluate(iter(micro_batches(batch, MICRO_BATCH, engine.mesh))).loss())


def skip(engine: AnyEngine) -> None:
    engine.apply(LEARNING_RATE, skip=torch.tensor(True))


def forbid_norms_of_deepspeed(engine: DeepSpeedEngine) -> None:
    """They read the device from the host; on the CPU nothing but this would tell."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("DeepSpeed takes a norm or looks for an overflow")

    optimizer = engine.chunks[0].optimizer
    for name in (
        "get_grad_norm_direct",
        "complete_grad_norm_calculation_for_cpu_offload",
        "get_grads_for_norm",
        "has_overflow",
        "_has_inf_or_nan",
    ):
        if hasattr(optimizer, name):
            setattr(optimizer, name, refuse)


class LateCopies:
    """Gradients on their way to the host as a GPU copies them: they land when they are waited for."""

    UNDERWAY = 12345.0

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.optimizer = engine.chunks[0].optimizer
        self.landing: dict[Tensor, Tensor] = {}
        self.optimizer._record_offload_copy = self.record

    def record(self) -> None:
        """After a copy to the host: takes it back."""
        for flat in self.optimizer.single_partition_of_fp32_groups:
            earlier = self.landing.get(flat, flat.grad)
            self.landing[flat] = torch.where(flat.grad == self.UNDERWAY, earlier, flat.grad)
            flat.grad.fill_(self.UNDERWAY)
        self.optimizer._pending_offload_events[get_accelerator().current_stream()] = self

    def synchronize(self) -> None:
        for flat, gradient in self.landing.items():
            assert flat.grad is not None
            flat.grad.copy_(gradient)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched: bytes by collective (of the larger side), and reads of tensors by the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        _, _, name = str(function).removesuffix(".default").rpartition(".")
        if function.namespace == "c10d":
            sides = [side if isinstance(side, list) else [side] for side in arguments[:2]]
            tensors = [[tensor for tensor in side if isinstance(tensor, Tensor)] for side in sides]
            self.bytes[name.strip("_")] += max(sum(tensor.nbytes for tensor in side) for side in tensors)
        self.reads += name == "_local_scalar_dense"
        return function(*arguments, **(keywords or {}))


@dataclass
class Facts:
    """What one rank saw."""

    built: dict[str, Any]
    shard_names: set[str]
    shard_elements: int
    gradient_dtypes: set[torch.dtype]
    gradient_elements: int
    traffic: dict[str, float]
    host_reads: int
    bytes_per_parameter: float
    fresh_is_initial: bool
    curve: Curve
    evaluations: list[float]
    unchanged: dict[str, bool]
    nan_norm: float
    empty_norm: float
    empty_loss: float
    same_as_control: bool
    views_are_live: bool
    weights_follow: dict[str, bool]
    after_going_back: Curve
    same_after_going_back: bool


def life(layout: Layout) -> Facts:
    """The task: both engines, on one rank."""
    before = set(resident_bytes())
    control = make(layout)
    if isinstance(control, DeepSpeedEngine):
        forbid_norms_of_deepspeed(control)
    fresh_is_initial = _is_initial(whole(control))
    early = train(control, batches()[EARLY], MICRO_BATCH)
    held = sum(size for storage, size in resident_bytes().items() if storage not in before)
    halfway = whole(control)
    late = train(control, batches()[LATE], MICRO_BATCH)

    engine = make(layout)
    if isinstance(engine, DeepSpeedEngine) and layout.offload and layout.stage in (1, 2):
        LateCopies(engine)
    fresh = snapshot(engine)
    weights_follow = {"fresh": _weights_follow(engine)}
    views = {(shard.name, state): view for shard in engine.shards() for state, view in shard.tensors.items()}
    evaluations = [evaluate(engine, batches()[0])]
    unchanged = {"fresh": same(fresh, snapshot(engine))}
    curve = train(engine, batches()[EARLY], MICRO_BATCH)
    disturbed = _disturb(engine)
    unchanged |= disturbed.unchanged
    evaluations.append(disturbed.evaluation)
    weights_follow["trained"] = _weights_follow(engine)
    more = train(engine, batches()[LATE], MICRO_BATCH)
    same_as_control = same(snapshot(engine), snapshot(control))
    engine.load_shards(halfway)
    weights_follow["gone back"] = _weights_follow(engine)
    again = train(engine, batches()[LATE], MICRO_BATCH)
    live = all(
        view.data_ptr() == views[shard.name, state].data_ptr()
        for shard in engine.shards()
        for state, view in shard.tensors.items()
    )

    assert curve == early, "the same engine twice has to train the same"
    assert more == late, "what was skipped or evaluated between them has to leave no trace"
    return Facts(
        built=_describe(control) if isinstance(control, DeepSpeedEngine) else {},
        shard_names={shard.name for shard in control.shards()},
        shard_elements=sum(shard.tensors[MASTER].numel() for shard in control.shards()),
        gradient_dtypes=disturbed.gradient_dtypes,
        gradient_elements=disturbed.gradient_elements,
        traffic=disturbed.traffic,
        host_reads=disturbed.host_reads,
        bytes_per_parameter=held / PARAMETERS,
        fresh_is_initial=fresh_is_initial,
        curve=Curve(curve.losses + more.losses, curve.gradient_norms + more.gradient_norms),
        evaluations=evaluations,
        unchanged=unchanged,
        nan_norm=disturbed.nan_norm,
        empty_norm=disturbed.empty_norm,
        empty_loss=disturbed.empty_loss,
        same_as_control=same_as_control,
        views_are_live=live,
        weights_follow=weights_follow,
        after_going_back=again,
        same_after_going_back=same(snapshot(engine), snapshot(control)),
    )


@dataclass
class Disturbed:
    unchanged: dict[str, bool]
    evaluation: float
    gradient_dtypes: set[torch.dtype]
    gradient_elements: int
    traffic: dict[str, float]
    host_reads: int
    nan_norm: float
    empty_norm: float
    empty_loss: float


def _disturb(engine: AnyEngine) -> Disturbed:
    """All that has to change nothing."""
    start = snapshot(engine)
    unchanged = {}
    other = samples.batch(samples=7, sequence_length=16, seed=99)
    slices, targets, yes = micro_batches(other, MICRO_BATCH, engine.mesh), count(other), torch.tensor(True)
    with Watch() as watch:
        engine.accumulate(slices, targets)
    dtypes = {gradient.tensor.dtype for gradient in engine.gradients}
    # ZeRO-1 and 2 pad the end of the last part with zeros.
    elements = sum(int((gradient.tensor != 0).sum()) for gradient in engine.gradients)
    with watch:
        engine.apply(LEARNING_RATE, yes)
    traffic = {name: round(size / PARAMETERS, 1) for name, size in watch.bytes.items() if size > 100}
    unchanged["skip"] = same(start, snapshot(engine))

    (chunk,) = engine.chunks
    losses_of = chunk.forward
    poison = torch.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    with mock.patch.object(chunk, "forward", lambda x, batch: losses_of(x, batch) * poison):
        nan_norm = accumulate(engine, other).gradient_norm
    skip(engine)
    unchanged["nan"] = same(start, snapshot(engine))

    empty = accumulate(engine, samples.empty_like(other))
    skip(engine)
    unchanged["no targets"] = same(start, snapshot(engine))

    evaluation = evaluate(engine, batches()[0])
    unchanged["evaluate"] = same(start, snapshot(engine))
    assert nan_norm is not None
    assert empty.gradient_norm is not None
    return Disturbed(
        unchanged=unchanged,
        evaluation=evaluation,
        gradient_dtypes=dtypes,
        gradient_elements=elements,
        traffic=traffic,
        host_reads=watch.reads,
        nan_norm=float(nan_norm),
        empty_norm=float(empty.gradient_norm),
        empty_loss=float(empty.loss()),
    )


def _weights_follow(engine: AnyEngine) -> bool:
    """By what all ranks hold, gathered, and by the engine's own check. Collective."""
    return weights_follow_masters(engine) and engine.differing_weights() is None


def _is_initial(state: WholeState) -> bool:
    initial = InitialWeights(MODEL, seed=0)
    return state.optimizer_step == 0 and all(
        torch.equal(tensor, initial.read(kind, name, 0, len(tensor)).to(tensor.dtype))
        for (kind, name), tensor in state.tensors.items()
    )


def _describe(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What DeepSpeed says of itself, and what it made."""
    (chunk,) = engine.chunks
    built, optimizer = chunk.engine, chunk.optimizer
    return {
        "stage": int(built.zero_optimization_stage()),
        "bf16": built.bfloat16_enabled(),
        "accumulation": built.gradient_accumulation_steps(),
        "clipping": (built.gradient_clipping(), getattr(optimizer, "clip_grad", 0.0)),
        "optimizer": (type(chunk.inner).__name__, chunk.inner.defaults["fused"]),
        "masters": {flat.dtype for flat in chunk.flats()},
        "master devices": {str(flat.device) for flat in chunk.flats()},
        "offload": getattr(optimizer, "cpu_offload", getattr(optimizer, "offload_optimizer", False)),
        "weights": {parameter.dtype for parameter in chunk.module.parameters()},
        "compiled": sorted(OpBuilder._loaded_ops),
        "sub-groups": len(getattr(optimizer, "fp16_groups", [])),
        "persistent": len(getattr(optimizer, "persistent_parameters", [])),
    }
