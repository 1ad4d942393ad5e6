"""Sets of terabytes, as links to one shard: to continue at any sample is to start, and takes no more memory."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data.format import open_set
from megatrain.data.loader import Loader, RankBatch
from megatrain.data.plan import Plan
from megatrain.data.samples import SampleOrder, open_sources
from megatrain.data.state import State
from megatrain.data_config import DataConfig, PhaseConfig, SourceConfig
from megatrain.objectives import build
from tests.data.sets import documents, write_linked_set
from tests.reference_order import Asked, ReferenceOrder, ReferenceRun, ReferenceSource

LENGTH, SIZE, SEED = 16, 64, 3
SHARDS, MEMBERS = 1000, [[9000, 700], [6000], [1500, 40]]
FIRST_BATCH_SECONDS = 0.2
MEMORY_BYTES = 200e6


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """About 1.1 million samples an epoch, of a source beside a smaller one."""
    folder = tmp_path_factory.mktemp("large")
    write_linked_set(folder / "web", SHARDS, MEMBERS)
    write_linked_set(folder / "books", 10, MEMBERS)
    sources = {
        "web": SourceConfig(path=str(folder / "web"), weight=0.9),
        "books": SourceConfig(path=str(folder / "books"), weight=0.1),
    }
    config = TrainConfig(
        seed=SEED,
        sequence_length=LENGTH,
        global_batch_size=SIZE,
        micro_batch_size=8,
        data=DataConfig(sources=sources),
    )
    return Plan(config, open_sources(config.data, LENGTH))


def first_batch(plan: Plan, n: int) -> tuple[RankBatch, float]:
    """The batch that a run continued at sample n begins with, and the seconds from the saved state to having it."""
    saved: State = {**plan.state(0), "n": n}
    before = time.perf_counter()
    loader = Loader(plan, build(ObjectiveConfig(), document_mask=True), plan.resume(saved, 1), step=1)
    batch = next(loader)
    seconds = time.perf_counter() - before
    loader.close()
    return batch, seconds


@pytest.mark.parametrize("n", [0, 10**6, 10**9, 10**12])
def test_the_first_batch_is_there_at_once(plan: Plan, n: int) -> None:
    torch.set_num_threads(1)
    assert min(first_batch(plan, n)[1] for _ in range(3)) < FIRST_BATCH_SECONDS


def test_sample_a_million_is_that_of_an_unbroken_walk(plan: Plan) -> None:
    """Places and permutations of all samples from 0 on, in one go; and the batches of the loader around."""
    order = SampleOrder(plan.sources(LENGTH), SEED)
    source, sample = order.locate(np.arange(10**6 + 10 * SIZE))
    start = 10**6 - 10**6 % SIZE
    batch, _ = first_batch(plan, start)
    walked = source[start : start + SIZE], sample[start : start + SIZE]
    assert [each.tolist() for each in order.locate(np.arange(start, start + SIZE))] == [w.tolist() for w in walked]
    whole = Loader(plan, build(ObjectiveConfig(), True), {**plan.state(0), "n": start - 5 * SIZE})
    for _ in range(5):
        next(whole)
    assert next(whole).digest == batch.digest
    whole.close()


def reference_sources(plan: Plan) -> dict[str, ReferenceSource]:
    return {
        source.name: ReferenceSource(
            documents(open_set(source.config.path), 1) * len(source.manifest.shards), source.config.weight
        )
        for source in plan.sources(LENGTH)
    }


@pytest.mark.parametrize("n", [10**6, 10**9])
def test_the_batch_is_that_of_the_reference(plan: Plan, n: int) -> None:
    reference = ReferenceOrder(reference_sources(plan), SEED, LENGTH)
    assert reference.samples == {source.name: source.index.samples for source in plan.sources(LENGTH)}
    assert first_batch(plan, n)[0].digest == reference.batch_digest(n, SIZE)


@pytest.mark.parametrize("n", [10**6, 10**9])
def test_the_batch_that_begins_a_segment_is_that_of_the_reference(plan: Plan, n: int) -> None:
    """At sample n begins a phase of other weights, and another of another length."""
    sources = reference_sources(plan)
    other = {**sources, "books": replace(sources["books"], weight=0.4)}
    phases = {"books": PhaseConfig(after_step=1, weights={"books": 0.4})}
    run = ReferenceRun(Asked(sources, LENGTH, SIZE), SEED)
    run.n = n
    run.change(Asked(other, LENGTH, SIZE))
    changed = Plan(replace(plan.config, phases=phases), plan.sources(LENGTH))
    assert run.step() == (n, first_batch(changed, n)[0].digest)
    phases["long"] = PhaseConfig(after_step=1, sequence_length=24, global_batch_size=48)
    run = ReferenceRun(Asked(sources, LENGTH, SIZE), SEED)
    run.n = n
    run.change(Asked(other, 24, 48))
    changed = Plan(replace(plan.config, phases=phases), plan.sources(LENGTH))
    assert run.step() == (n, first_batch(changed, n)[0].digest)


MEMORY = """
import sys, time
import numpy as np, psutil, torch
from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data_config import DataConfig
from megatrain.data.loader import Loader
from megatrain.data.plan import Plan
from megatrain.data.samples import open_sources
from megatrain.objectives import build

def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

torch.set_num_threads(1)
objective = build(ObjectiveConfig(), True)
small, large = (TrainConfig(sequence_length=8, global_batch_size=512, micro_batch_size=512,
                data=DataConfig(path=path)) for path in sys.argv[1:])

def read(config):
    before = time.perf_counter()
    plan = Plan(config, open_sources(config.data, 8))
    seconds = time.perf_counter() - before
    for n in (10**6, 10**9):
        loader = Loader(plan, objective, {**plan.state(0), "n": n})
        for _ in range(10):
            next(loader)
        loader.close()
    return plan.sources(8)[0].index.samples, seconds

baseline = anonymous()
read(small)
samples, seconds = read(large)
print(samples, anonymous() - baseline, seconds)
"""
"""Prints samples of an epoch, bytes of its own memory above what it had before it opened a set, and seconds to open it.
What is mapped from files isn't counted: the ranks of a node share it, and the kernel takes it back."""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """A hundred thousand shards of a hundred members, ten billion samples."""
    write_linked_set(tmp_path / "small", 2, [[8_001]] * 100)
    write_linked_set(tmp_path / "large", 100_000, [[8_001]] * 100)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    for which in ("first", "again"):
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=800).stdout
        samples, more, seconds = map(float, printed.split())
        print(f"{which}: {samples:.0f} samples, {more / 1e6:.0f} MB, opened in {seconds:.1f} s")
    assert samples >= 1e10
    assert more < MEMORY_BYTES
