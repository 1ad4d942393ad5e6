"""Pipelines beyond the matrix of test_parity.py: evaluation, what changes nothing, traffic, host reads, memory.

Two pipelines of two ranks, with one stage a rank (1F1B) and with two (interleaved 1F1B).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from megatrain.batch import IGNORE, Batch
from megatrain.config import ParallelConfig, Precision
from megatrain.engines import pipeline
from megatrain.engines.deepspeed_internals import Stage3Adapter
from megatrain.model.spec import parameter_count
from tests import reference, samples
from tests.distributed.engine_life import Watch
from tests.distributed.matrix import ENGINES, MODEL
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, AnyEngine, make_engine, micro_batches, train
from tests.engines.states import same, snapshot

pytestmark = pytest.mark.distributed

RANKS = 4
MICRO_BATCHES = 4
SCHEDULES = {
    "1f1b": ParallelConfig(pipeline=2),
    "interleaved_1f1b": ParallelConfig(pipeline=2, virtual_stages=2, schedule="interleaved_1f1b"),
}


@dataclass(frozen=True)
class Layout:
    engine: str
    schedule: str
    precision: Precision = Precision.fp64

    def __str__(self) -> str:
        return f"{self.engine}-{self.schedule}-{self.precision.value}"

    @property
    def stages(self) -> int:
        """Of a pipeline."""
        return 2 * SCHEDULES[self.schedule].virtual_stages

    def make(self) -> AnyEngine:
        return make_engine(ENGINES[self.engine], self.precision, model=MODEL, parallel=SCHEDULES[self.schedule])


LAYOUTS = [
    *(Layout(engine, schedule) for engine in ("zero3", "fsdp-full", "fsdp-gradient") for schedule in SCHEDULES),
    Layout("zero0", "1f1b"),
    Layout("zero1", "1f1b", Precision.bf16),
    Layout("zero2", "1f1b", Precision.bf16),
]
LONG = [
    Layout("zero1", "interleaved_1f1b"),
    Layout("zero2", "interleaved_1f1b"),
    Layout("zero3-offload", "1f1b"),
]
"""What `make test` leaves out."""


def batches() -> list[Batch]:
    return [samples.batch(samples=7, sequence_length=16, seed=step) for step in range(4)]


@dataclass
class Facts:
    """What one rank saw. evaluations: of a batch, by the number of micro-batches it came in."""

    losses: list[float]
    gradient_norms: list[float]
    evaluations: dict[int, float]
    unchanged: dict[str, bool]
    nan_norm: float
    traffic: dict[str, int]
    host_reads: int
    most_received: int
    left_whole: list[int]


def life(layout: Layout) -> Facts:
    """The task: trains, with all that has to change nothing in between."""
    engine = layout.make()
    first, *rest = batches()
    evaluations = {size: evaluate(engine, first, 8 // size // 2) for size in (1, 2, 4)}
    # As few micro-batches as a pipeline has ranks, then more.
    few, more = train(engine, [first, rest[0]], 2), train(engine, [rest[1]], 1)

    unchanged = {}
    before = snapshot(engine)
    evaluate(engine, first, 1)
    unchanged["evaluate"] = same(before, snapshot(engine))
    with poisoned(engine):
        nan_norm = engine.accumulate(micro_batches(first, 1, engine.mesh), count(first)).gradient_norm
    engine.apply(LEARNING_RATE, skip=torch.tensor(True))
    unchanged["nan"] = same(before, snapshot(engine))

    mine, targets = micro_batches(rest[2], 1, engine.mesh), count(rest[2])
    with Watch() as watch, received_at_once() as received, weights_left(engine) as left:
        stats = engine.accumulate(mine, targets)
    with watch:
        engine.apply(LEARNING_RATE, skip=torch.tensor(False))
    assert stats.gradient_norm is not None
    assert nan_norm is not None
    return Facts(
        losses=[*few.losses, *more.losses, float(stats.loss())],
        gradient_norms=[*few.gradient_norms, *more.gradient_norms, float(stats.gradient_norm)],
        evaluations=evaluations,
        unchanged=unchanged,
        nan_norm=float(nan_norm),
        traffic=dict(watch.bytes),
        host_reads=watch.reads,
        most_received=max(received),
        left_whole=left,
    )


def count(batch: Batch) -> Tensor:
    return (batch.targets != IGNORE).sum()


def evaluate(engine: AnyEngine, batch: Batch, micro_batch_size: int) -> float:
    return float(engine.evaluate(iter(micro_batches(batch, micro_batch_size, engine.mesh))).loss())


@contextmanager
def poisoned(engine: AnyEngine) -> Iterator[None]:
    """What the last rank's first chunk gives is NaN."""
    chunk = engine.chunks[0]
    forward, poison = chunk.forward, torch.nan if dist.get_rank() == RANKS - 1 else 1.0
    with mock.patch.object(chunk, "forward", lambda x, batch: forward(x, batch) * poison):
        yield


@contextmanager
def received_at_once() -> Iterator[list[int]]:
    """How many buffers of hidden states and gradients were alive whenever another was made."""
    alive: list[weakref.ref[Tensor]] = []
    numbers = [0]
    receive = pipeline._Stage.receive

    def counted(stage: Any, batch: Batch, source: int) -> Any:
        result = receive(stage, batch, source)
        alive.append(weakref.ref(result[0]))
        numbers.append(sum(buffer() is not None for buffer in alive))
        return result

    with mock.patch.object(pipeline._Stage, "receive", counted):
        yield numbers


@contextmanager
def weights_left(engine: AnyEngine) -> Iterator[list[int]]:
    """At ZeRO-3, how many weights were still whole when each backward was over, before DeepSpeed frees the rest."""
    numbers: list[int] = []
    for chunk in engine.chunks:
        if isinstance(chunk, Stage3Adapter):
            release = chunk.offload.release_backward_leftovers

            def counted(chunk: Any = chunk, release: Any = release) -> None:
                weights = [p for p in chunk.module.parameters() if not p.ds_persist]
                numbers.append(sum(p.ds_status is not ZeroParamStatus.NOT_AVAILABLE for p in weights))
                release()

            chunk.offload.release_backward_leftovers = counted
    yield numbers


@pytest.fixture(
    scope="module",
    params=[*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.long) for layout in LONG)],
    ids=str,
)
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture(scope="module")
def facts(pool: Pool, layout: Layout) -> list[Facts]:
    return pool.run(life, ranks=RANKS, layout=layout)


@pytest.fixture(scope="module")
def expected(layout: Layout) -> reference.Result:
    rates = [LEARNING_RATE] * 4
    return reference.train(MODEL, samples.OPTIM, batches(), rates, 1, layout.precision)


def test_losses_and_norms_are_the_references(layout: Layout, facts: list[Facts], expected: reference.Result) -> None:
    exact = layout.engine.startswith("fsdp") or layout.engine == "zero0"
    tolerance = 2e-2 if layout.precision is Precision.bf16 else 1e-12 if exact else 1e-6
    for rank in facts:
        assert reference.difference(rank.losses, expected.losses) <= tolerance
        assert reference.difference(rank.gradient_norms, expected.gradient_norms) <= tolerance
        # In groups of as many micro-batches as a pipeline has ranks, and in a last one with fewer.
        for evaluation in rank.evaluations.values():
            assert evaluation == pytest.approx(expected.losses[0], rel=tolerance)


def test_every_rank_has_the_same_stats(facts: list[Facts]) -> None:
    for rank in facts[1:]:
        assert (rank.losses, rank.gradient_norms) == (facts[0].losses, facts[0].gradient_norms)
        assert rank.evaluations == facts[0].evaluations


def test_what_changes_nothing(facts: list[Facts]) -> None:
    for rank in facts:
        assert rank.unchanged == {"evaluate": True, "nan": True}
        assert rank.nan_norm != rank.nan_norm, "a NaN in one chunk has to show on all ranks"


def test_each_boundary_is_crossed_once_in_each_direction(layout: Layout, facts: list[Facts]) -> None:
    width = 2 if layout.precision is Precision.bf16 else 8
    boundaries = layout.stages - 1
    for rank in facts:
        # Both ranks of a pipeline have a side of each boundary.
        assert rank.traffic["send"] == rank.traffic["recv"] == boundaries * MICRO_BATCHES * 16 * 64 * width


def test_the_host_reads_nothing(layout: Layout, facts: list[Facts]) -> None:
    """ZeRO-3 reads a scalar for each chunk, which the replaced norm made on the host. It compares no orders of modules
    among ranks, by broadcasts whose result the host waits for.
    """
    for rank in facts:
        assert rank.host_reads == (layout.stages // 2 if layout.engine.startswith("zero3") else 0)
        assert "broadcast" not in rank.traffic


def test_memory_is_made_for_what_is_in_flight(layout: Layout, facts: list[Facts]) -> None:
    # Of 8 and 24 that a step receives.
    most = {"1f1b": 2, "interleaved_1f1b": 6}[layout.schedule]
    assert max(rank.most_received for rank in facts) == most


def test_weights_are_gathered_once_for_each_forward_and_each_backward(layout: Layout, facts: list[Facts]) -> None:
    if layout.engine.split("-")[0] not in ("zero3", "fsdp"):
        return
    width = 2 if layout.precision is Precision.bf16 else 8
    # Both ranks have the same number of layers, and as many weights in the embedding as in the head.
    end = MODEL.vocab_size * MODEL.hidden_size
    half = parameter_count(MODEL) // 2
    for number, rank in enumerate(facts):
        times = 2 * MICRO_BATCHES * half
        if layout.engine == "fsdp-full" and number >= RANKS // 2:
            # From a forward to its backward the head isn't freed.
            times -= MICRO_BATCHES * end
        elif layout.engine == "fsdp-gradient":
            times = half
        assert rank.traffic["allgather_base"] == pytest.approx(times * width, rel=0.01)


def test_zero_3_frees_weights_as_backward_goes(layout: Layout, facts: list[Facts]) -> None:
    """But for the embedding, whose input has no gradient: DeepSpeed frees it in the end."""
    for rank in facts:
        assert bool(rank.left_whole) == layout.engine.startswith("zero3")
        assert set(rank.left_whole) <= {0, 1}


def comparisons() -> list[bool]:
    """The task: whether DeepSpeed's ranks agree on what is equal in a data-parallel group, and on what isn't."""
    mesh = Layout("zero3", "1f1b").make().mesh
    found = []
    for number in (mesh.pipeline_rank, mesh.data_rank):
        try:
            partitioned_param_coordinator.assert_ints_same_as_other_ranks([7, number])
            found.append(True)
        except RuntimeError:
            found.append(False)
    return found


def test_deepspeed_compares_ranks_within_a_stage(pool: Pool) -> None:
    """Its own function asks all ranks, of which those of other stages have other modules, and come at other times."""
    assert pool.run(comparisons, ranks=RANKS) == [[True, True], [True, False], [True, True], [True, False]]
