"""Law 1 in rows: what one layout saved continues in another, held to one process that never stopped.

Design choices:
- A pair is two layouts by name ("zero3 tp2 pp2 dp2"), and the precision and the model that both train. The first trains
  two steps and saves; the second loads, in engines that were made with another seed, and trains five more.
- The run that never stopped is law 4's one process, tests/reference.py, through all seven steps. Those before the save
  and those after it make one curve, and that curve is held to what law 4 allows.
- The same layout is held to itself: after saving it trains on, and whoever loads has to train the same bits.
- What is loaded is saved again before a step is taken, and every state of every parameter must have the same bits,
  whichever ranks hold them. Only from fp64 masters to DeepSpeed's fp32 is it what they round to.
- As the trainer will, ranks hold their weights against the masters before each save.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatrain.batch import Batch
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import ModelConfig, ParallelConfig, Precision
from megatrain.model import spec
from megatrain.resilience.agreement import Agreement
from tests import reference, samples
from tests.distributed.matrix import ENGINES, MODELS, SEEDS, Found, distance
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, AnyEngine, Curve, make_engine, train
from tests.engines.states import resident_bytes, same, snapshot

SAVED_STEP, STEPS = 2, 7
GLOBAL_BATCH = 7
TIMEOUT = 100.0
OTHER_SEED = 99
STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """An engine and how its ranks are divided, by words: "zero1-offload dp2", "fsdp-full interleaved pp2 tp2 dp2"."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def engine(self) -> str:
        """Of matrix.ENGINES."""
        return self.name.split()[0]

    @property
    def parallel(self) -> ParallelConfig:
        interleaved = "interleaved" in self.name
        return ParallelConfig(
            tensor=self._size("tp"),
            pipeline=self._size("pp"),
            virtual_stages=2 if interleaved else 1,
            schedule="interleaved_1f1b" if interleaved else "1f1b",
            replicate=self._size("replicate"),
        )

    @property
    def ranks(self) -> int:
        return self._size("tp") * self._size("pp") * self._size("dp")

    @property
    def micro_batch_size(self) -> int:
        """In samples. A rank has as many of them in a step as there are stages, and at least two."""
        return -(-GLOBAL_BATCH // (self._size("dp") * max(2, self._size("pp"))))

    @property
    def fp64_masters(self) -> bool:
        """At precision=fp64."""
        return self.engine == "zero0" or self.engine.startswith("fsdp")

    def _size(self, word: str) -> int:
        found = re.search(rf" {word}(\d+)", self.name)
        return int(found[1]) if found else 1


@dataclass(frozen=True)
class Work:
    """What a layout trains. model: of matrix.MODELS."""

    layout: Layout
    precision: Precision = Precision.fp32
    model: str = "plain"

    def __str__(self) -> str:
        return f"{self.layout}, {self.precision.value} {self.model}"

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.model]

    def make(self, seed: int) -> AnyEngine:
        """The engine of this rank."""
        layout = self.layout
        return make_engine(
            ENGINES[layout.engine],
            self.precision,
            layout.micro_batch_size,
            self.config,
            seed=seed,
            parallel=layout.parallel,
        )

    def train(self, engine: AnyEngine, seed: int, first: int, last: int) -> Curve:
        """Steps [first, last) of the run of a seed."""
        return train(engine, batches(seed)[first:last], self.layout.micro_batch_size)


@dataclass(frozen=True)
class Pair:
    """before saves, after loads."""

    before: str
    after: str
    precision: Precision = Precision.fp32
    model: str = "plain"

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}, {self.precision.value} {self.model}"

    @property
    def works(self) -> tuple[Work, Work]:
        """What the two train."""
        before, after = Layout(self.before), Layout(self.after)
        return Work(before, self.precision, self.model), Work(after, self.precision, self.model)


@cache
def batches(seed: int) -> list[Batch]:
    return [samples.batch(samples=GLOBAL_BATCH, sequence_length=16, seed=1000 * seed + step) for step in range(STEPS)]


def save(engine: AnyEngine, run_dir: Path) -> Path:
    """Saves what an engine holds as step SAVED_STEP of a run, if its weights are its masters."""
    differing = engine.differing_weights()
    assert differing is None, f"{differing}: its weights aren't its masters"
    return write(engine, run_dir)


def write(engine: AnyEngine, run_dir: Path) -> Path:
    """The same, without a look at the weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    manager = CheckpointManager(run_dir, rank, size, Agreement(_get_default_store(), size, str(run_dir)))
    state = TrainerState(
        step=SAVED_STEP,
        optimizer_step=engine.optimizer_step(),
        samples=GLOBAL_BATCH * SAVED_STEP,
        data={},
        config={},
        tokenizer={},
        wandb_run_id=None,
    )
    return manager.save(SAVED_STEP, engine.shards(), state)


def start(work: Work, run_dirs: Sequence[Path], until: int) -> list[Curve]:
    """The task of the layout that saves, a run for each seed: the curve up to step `until`, saved on the way."""
    curves = []
    for seed, run_dir in enumerate(run_dirs):
        engine = work.make(seed)
        before = work.train(engine, seed, 0, SAVED_STEP)
        save(engine, run_dir)
        after = work.train(engine, seed, SAVED_STEP, until)
        curves.append(Curve(before.losses + after.losses, before.gradient_norms + after.gradient_norms))
    return curves


def resume(work: Work, folders: Sequence[Path], run_dirs: Sequence[Path], twice: bool) -> list[Curve]:
    """The task of the layout that loads: it saves again at once; the curve of the steps that follow.

    twice: it loads once more after them, which has to go back to the bit and to take no more memory.
    """
    curves = []
    for seed, (folder, run_dir) in enumerate(zip(folders, run_dirs, strict=True)):
        # Another seed: nothing of the initial weights may be left.
        engine = work.make(OTHER_SEED)
        engine.load_shards(CheckpointReader(folder))
        save(engine, run_dir)
        loaded = snapshot(engine)
        curves.append(work.train(engine, seed, SAVED_STEP, STEPS))
        if twice:
            size = sum(resident_bytes().values())
            engine.load_shards(CheckpointReader(folder))
            assert same(loaded, snapshot(engine))
            assert sum(resident_bytes().values()) <= size
    return curves


@dataclass(frozen=True)
class Saved:
    """What a layout saved, by seed, and what its run trained."""

    folders: list[Path]
    curves: list[Curve]


class Runs:
    """Runs that save and runs that load, each of the former made once."""

    def __init__(self, pool: Pool, root: Path) -> None:
        self.pool = pool
        self.run_dirs = (root / f"run_{number}" for number in count())

    @cache  # noqa: B019
    def of(self, work: Work, seeds: int = 1, until: int = SAVED_STEP) -> Saved:
        """What `work` saved, and its curves from the start to step `until`."""
        run_dirs = [next(self.run_dirs) for _ in range(seeds)]
        ranks = self.pool.run(
            start, ranks=work.layout.ranks, timeout=TIMEOUT, work=work, run_dirs=run_dirs, until=until
        )
        return Saved([_folder(run_dir) for run_dir in run_dirs], ranks[0])

    def through(self, work: Work, folders: Sequence[Path], twice: bool = False) -> Saved:
        """What `work` saves again of the checkpoints in `folders`, and its curves from there. twice: see `resume`."""
        run_dirs = [next(self.run_dirs) for _ in folders]
        ranks = self.pool.run(
            resume,
            ranks=work.layout.ranks,
            timeout=TIMEOUT,
            work=work,
            folders=folders,
            run_dirs=run_dirs,
            twice=twice,
        )
        assert all(curves == ranks[0] for curves in ranks), "Stats have to be equal on every rank"
        return Saved([_folder(run_dir) for run_dir in run_dirs], ranks[0])


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step_{SAVED_STEP:08d}"


def assert_same_state(a: Path, b: Path, model: ModelConfig) -> None:
    """Every state of every parameter has the same bits in both, or what fp64 rounds to; nothing else is there."""
    one, other = CheckpointReader(a), CheckpointReader(b)
    assert one.optimizer_step == other.optimizer_step == SAVED_STEP
    assert one.shapes == other.shapes == {p.name: p.shape for p in spec.parameters(model)}
    assert set(one.index) == set(other.index) == {(state, name) for state in STATES for name in one.shapes}
    for state, name in one.index:
        size = one.index[state, name].size
        again = other.read(state, name, 0, size)
        was = one.read(state, name, 0, size).to(again.dtype)
        assert torch.equal(was.view(torch.uint8), again.view(torch.uint8)), (state, name)


@cache
def one_process(
    model: str, precision: Precision, seed: int = 0, micro_batch_size: int = GLOBAL_BATCH
) -> reference.Result:
    rates = [LEARNING_RATE] * STEPS
    return reference.train(MODELS[model], samples.OPTIM, batches(seed), rates, micro_batch_size, precision, seed)


@cache
def floor(model: str) -> float:
    return reference.floor(lambda size: one_process(model, Precision.fp32, micro_batch_size=size))


def measure(runs: Runs, pair: Pair) -> Found:
    """Trains the pair on real ranks. Raises AssertionError where what it loads isn't what it saves."""
    before, after = pair.works
    seeds = SEEDS if pair.precision is Precision.bf16 else 1
    saved = runs.of(before, seeds)
    loaded = runs.through(after, saved.folders)
    for folder, again in zip(saved.folders, loaded.folders, strict=True):
        assert_same_state(folder, again, before.config)
    curves = [
        Curve(a.losses + b.losses, a.gradient_norms + b.gradient_norms)
        for a, b in zip(saved.curves, loaded.curves, strict=True)
    ]
    if pair.precision is Precision.bf16:
        exact = [one_process(pair.model, Precision.fp32, seed) for seed in range(seeds)]
        its_own = fmean(
            reference.distance(one_process(pair.model, Precision.bf16, seed), exact[seed]) for seed in range(seeds)
        )
        return Found(fmean(map(distance, curves, exact)), 1.25 * its_own)
    difference = distance(curves[0], one_process(pair.model, pair.precision))
    if pair.precision is Precision.fp32:
        return Found(difference, 4 * floor(pair.model))
    fp64_throughout = all(work.layout.fp64_masters for work in pair.works)
    return Found(difference, 1e-12 if fp64_throughout else 1e-6)
