"""Sets of terabytes, as links to one shard: to continue at any sample is to start, and takes no more memory."""

from __future__ import annotations

import subprocess
import sys
import time
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
from megatrain.data_config import DataConfig, SourceConfig
from megatrain.objectives import build
from tests.data.sets import documents, write_linked_set
from tests.reference_order import ReferenceOrder, ReferenceSource

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


@pytest.mark.parametrize("n", [10**6, 10**9])
def test_the_batch_is_that_of_the_reference(plan: Plan, n: int) -> None:
    sources = {
        source.name: ReferenceSource(
            documents(open_set(source.config.path), 1) * len(source.manifest.shards), source.config.weight
        )
        for source in plan.sources(LENGTH)
    }
    reference = ReferenceOrder(sources, SEED, LENGTH)
    assert reference.samples == {source.name: source.index.samples for source in plan.sources(LENGTH)}
    assert first_batch(plan, n)[0].digest == reference.batch_digest(n, SIZE)


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
    loader = Loader(plan, objective, {**plan.state(0), "n": 10**9})
    for _ in range(20):
        next(loader)
    loader.close()
    return plan.sources(8)[0].index.samples, seconds

read(small)
baseline = anonymous()
samples, seconds = read(large)
print(samples, anonymous() - baseline, seconds)
"""
"""Prints samples of an epoch, bytes of its own memory above that with a small set, and seconds to open the set. What
is mapped from files isn't counted: the ranks of a node share it, and the kernel takes it back."""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """A hundred thousand shards of ten members, ten billion samples."""
    write_linked_set(tmp_path / "small", 2, [[80_000]] * 10)
    write_linked_set(tmp_path / "large", 100_000, [[80_001]] * 10)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout
    samples, more, seconds = map(float, printed.split())
    print(f"{samples:.0f} samples: {more / 1e6:.0f} MB, opened in {seconds:.1f} s")
    assert samples >= 1e10
    assert more < MEMORY_BYTES
