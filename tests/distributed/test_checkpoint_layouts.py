"""Law 1 with real engines: a checkpoint of one layout continues in any other, and loses nothing on the way.

Two steps are trained and saved, and two more trained. Each other layout loads what was saved, saves it again at once
(every state has to come out with the same bits) and trains the same two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatrain.batch import Batch
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, FsdpShard, ParallelConfig, Precision
from megatrain.model import spec
from megatrain.resilience.agreement import Agreement
from tests import reference, samples
from tests.distributed.pool import Pool
from tests.distributed.training import AnyEngine, Curve, make_engine, train
from tests.engines.states import resident_bytes, same, snapshot

pytestmark = pytest.mark.distributed

MICRO_BATCH = 2
SAVED_STEP, STEPS = 2, 4
MODEL = replace(samples.MODEL, num_layers=4, tie_embeddings=True)
STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """stage: of ZeRO; or how FSDP shards."""

    ranks: int
    stage: int | FsdpShard
    precision: Precision = Precision.fp32
    offload: bool = False
    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1

    def __str__(self) -> str:
        engine = f"fsdp-{self.stage.value}" if isinstance(self.stage, FsdpShard) else f"zero{self.stage}"
        parallel = f"-tp{self.tensor}" * (self.tensor > 1) + f"-pp{self.pipeline}" * (self.pipeline > 1)
        return f"{self.ranks}x-{engine}-{self.precision.name}{'-offload' * self.offload}{parallel}" + (
            "-interleaved" * (self.virtual_stages > 1)
        )

    def make(self, seed: int = 0) -> AnyEngine:
        """An engine on this rank."""
        schedule = "interleaved_1f1b" if self.virtual_stages > 1 else "1f1b"
        parallel = ParallelConfig(self.tensor, self.pipeline, self.virtual_stages, schedule)
        return make_engine(self.engine(), self.precision, MICRO_BATCH, MODEL, seed=seed, parallel=parallel)

    def engine(self) -> EngineConfig:
        if isinstance(self.stage, FsdpShard):
            return FsdpConfig(shard=self.stage)
        return DeepSpeedConfig(zero_stage=self.stage, offload_optimizer=self.offload, persistence_elements=100)


def batches(first: int, last: int) -> list[Batch]:
    return [samples.batch(samples=7, sequence_length=16, seed=step) for step in range(first, last)]


def save(engine: AnyEngine, run_dir: Path, name: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    manager = CheckpointManager(run_dir, rank, size, Agreement(_get_default_store(), size, name))
    state = TrainerState(
        step=SAVED_STEP,
        optimizer_step=engine.optimizer_step(),
        samples=7 * SAVED_STEP,
        data={},
        config={},
        tokenizer={},
        wandb_run_id=None,
    )
    manager.save(SAVED_STEP, engine.shards(), state)


def start(layout: Layout, run_dir: Path) -> tuple[Curve, Curve]:
    """The task of the layout that saves: its losses before and after."""
    engine = layout.make()
    before = train(engine, batches(0, SAVED_STEP), MICRO_BATCH)
    save(engine, run_dir, "start")
    return before, train(engine, batches(SAVED_STEP, STEPS), MICRO_BATCH)


def resume(layout: Layout, folder: Path, run_dir: Path) -> tuple[Curve, bool]:
    """The task of the layout that loads: the losses that follow, and whether loading once more goes back to the bit."""
    # Another seed: nothing of the initial weights may be left.
    engine = layout.make(seed=99)
    engine.load_shards(CheckpointReader(folder))
    save(engine, run_dir, "resume")
    loaded = snapshot(engine)
    curve = train(engine, batches(SAVED_STEP, STEPS), MICRO_BATCH)
    size = sum(resident_bytes().values())
    engine.load_shards(CheckpointReader(folder))
    assert sum(resident_bytes().values()) <= size, "loading again must not hold the state twice"
    return curve, same(loaded, snapshot(engine))


class Runs:
    """Checkpoints by the layouts that they went through, each made once."""

    def __init__(self, pool: Pool, root: Path) -> None:
        self.pool = pool
        self.root = root
        self.folders = (root / f"run_{number}" for number in count())

    @cache  # noqa: B019
    def of(self, layout: Layout) -> tuple[Path, Curve]:
        """What `layout` saved, and its losses afterwards."""
        run_dir = next(self.folders)
        ranks = self.pool.run(start, ranks=layout.ranks, layout=layout, run_dir=run_dir)
        _, after = ranks[0]
        return run_dir / "checkpoints" / f"step_{SAVED_STEP:08d}", after

    def through(self, layout: Layout, folder: Path) -> tuple[Path, Curve]:
        """What `layout` saves again of the checkpoint in `folder`, and its losses afterwards."""
        run_dir = next(self.folders)
        ranks = self.pool.run(resume, ranks=layout.ranks, layout=layout, folder=folder, run_dir=run_dir)
        assert all(went_back for _, went_back in ranks)
        curve, _ = ranks[0]
        return run_dir / "checkpoints" / f"step_{SAVED_STEP:08d}", curve


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(pool, tmp_path_factory.mktemp("layouts"))


def assert_same_state(a: Path, b: Path) -> None:
    """Every state of every parameter has the same bits in both checkpoints, and nothing else is there."""
    one, other = CheckpointReader(a), CheckpointReader(b)
    assert one.optimizer_step == other.optimizer_step == SAVED_STEP
    assert one.shapes == other.shapes == {p.name: p.shape for p in spec.parameters(MODEL)}
    assert set(one.index) == set(other.index) == {(state, name) for state in STATES for name in one.shapes}
    for state, name in one.index:
        size = one.index[state, name].size
        assert torch.equal(one.read(state, name, 0, size), other.read(state, name, 0, size)), (state, name)


SAME = [
    Layout(2, 0),
    Layout(2, 1, Precision.bf16),
    Layout(2, 2, offload=True),
    Layout(2, 2, Precision.bf16),
    Layout(2, 3),
    Layout(2, 3, Precision.bf16, offload=True),
    Layout(2, FsdpShard.full),
    Layout(2, FsdpShard.gradient, Precision.bf16),
    Layout(4, 3, Precision.bf16, tensor=2, pipeline=2),
]


@pytest.mark.parametrize("layout", SAME, ids=str)
def test_the_same_layout_continues_to_the_bit(runs: Runs, layout: Layout) -> None:
    folder, expected = runs.of(layout)
    again, curve = runs.through(layout, folder)
    assert curve == expected
    assert_same_state(folder, again)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 1),
        Layout(1, 3),
        Layout(2, 0),
        Layout(2, 2),
        Layout(2, 3, offload=True),
        Layout(3, 2, offload=True),
        Layout(3, 3),
        Layout(1, FsdpShard.full),
        Layout(2, FsdpShard.gradient),
        Layout(3, FsdpShard.full),
        Layout(2, 3, tensor=2),
        Layout(2, 2, offload=True, pipeline=2),
        Layout(4, 1, tensor=4),
        Layout(4, 3, pipeline=2, virtual_stages=2),
        Layout(4, FsdpShard.gradient, tensor=2, pipeline=2),
    ],
    ids=str,
)
def test_another_layout_continues_with_the_same_numbers(runs: Runs, layout: Layout) -> None:
    folder, expected = runs.of(Layout(2, 3))
    again, curve = runs.through(layout, folder)
    assert_same_state(folder, again)
    assert reference.difference(curve.losses, expected.losses) <= 4 * 2.5e-7
    assert reference.difference(curve.gradient_norms, expected.gradient_norms) <= 4 * 2.5e-7


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(2, 3), Layout(3, 1), Layout(3, FsdpShard.full)], ids=str)
def test_from_fsdp_another_layout_continues_with_the_same_numbers(runs: Runs, layout: Layout) -> None:
    folder, expected = runs.of(Layout(2, FsdpShard.full))
    again, curve = runs.through(layout, folder)
    assert_same_state(folder, again)
    assert reference.difference(curve.losses, expected.losses) <= 4 * 2.5e-7
    assert reference.difference(curve.gradient_norms, expected.gradient_norms) <= 4 * 2.5e-7


def test_through_many_layouts_and_back(runs: Runs) -> None:
    folder, expected = runs.of(Layout(2, 3))
    came: Path = folder
    others = (
        Layout(1, 2),
        Layout(2, FsdpShard.full),
        Layout(2, 1),
        Layout(1, FsdpShard.gradient),
        Layout(3, FsdpShard.full),
        Layout(3, 3, offload=True),
        Layout(4, 3, tensor=2, pipeline=2),
        Layout(1, 0),
        Layout(4, FsdpShard.full, pipeline=2, virtual_stages=2),
        Layout(4, 2, tensor=4),
    )
    for layout in (*others, Layout(2, 3)):
        came, curve = runs.through(layout, came)
    assert_same_state(folder, came)
    assert curve == expected


@pytest.mark.parametrize(
    ("saved", "layout"),
    [
        (Layout(2, 2, Precision.bf16), Layout(2, 3, Precision.bf16)),
        (Layout(2, 2, Precision.bf16), Layout(1, 1, Precision.bf16)),
        (Layout(2, 2, Precision.bf16), Layout(2, FsdpShard.full, Precision.bf16)),
        (Layout(2, FsdpShard.gradient, Precision.bf16), Layout(2, 3, Precision.bf16)),
        (Layout(2, FsdpShard.gradient, Precision.bf16), Layout(3, FsdpShard.full, Precision.bf16)),
    ],
    ids=str,
)
def test_other_layouts_in_bf16(runs: Runs, saved: Layout, layout: Layout) -> None:
    """The same micro-batches at the same weights: the first loss has the same bits."""
    folder, expected = runs.of(saved)
    again, curve = runs.through(layout, folder)
    assert_same_state(folder, again)
    if layout.ranks == 2:
        assert curve.losses[0] == expected.losses[0]
    assert reference.difference(curve.losses, expected.losses) <= 1e-2
