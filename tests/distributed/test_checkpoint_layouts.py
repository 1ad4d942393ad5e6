"""Law 1 with real engines: a checkpoint of any layout continues in any other, and loses nothing on the way.

checkpoint_matrix.py says how a pair of layouts is measured. The pairs that span the matrix run in `make test`, all of
them in `make test-parity`. What would go wrong, and what sees it, is in test_checkpoint_omissions.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatrain.checkpoint.format import CHUNK_BYTES
from megatrain.checkpoint.reader import CheckpointReader, Piece
from megatrain.config import FsdpConfig, ParallelConfig, Precision
from tests import samples
from tests.distributed.checkpoint_matrix import (
    SAVED_STEP,
    STEPS,
    Layout,
    Pair,
    Runs,
    Work,
    assert_same_state,
    measure,
    save,
)
from tests.distributed.matrix import zero
from tests.distributed.pool import Pool
from tests.distributed.training import make_engine

pytestmark = pytest.mark.distributed

bf16, fp64 = Precision.bf16, Precision.fp64


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The reference runs beside the ranks.
    yield Runs(pool, tmp_path_factory.mktemp("layouts"))
    torch.set_num_threads(threads)


SAME = [
    Work(Layout("zero0 dp2")),
    Work(Layout("zero1 dp2"), bf16),
    Work(Layout("zero2 dp2"), bf16),
    Work(Layout("zero3 dp2")),
    Work(Layout("zero3-offload dp2"), bf16),
    Work(Layout("fsdp-full dp2")),
    Work(Layout("fsdp-gradient dp2"), bf16),
    Work(Layout("zero3 pp2"), bf16, "tied"),
]
SAME_LONG = [
    Work(Layout("zero2-offload dp2")),
    Work(Layout("zero1 interleaved pp2 dp2"), bf16),
    Work(Layout("zero2 tp2 dp2"), bf16, "tied"),
    Work(Layout("zero3 tp2 pp2"), bf16, "tied"),
    Work(Layout("zero3 tp2 pp2 dp2")),
    Work(Layout("zero1-offload dp3"), Precision.fp32, "biases"),
    Work(Layout("fsdp-full replicate2 dp4"), bf16),
    Work(Layout("fsdp-gradient interleaved pp2 tp2 dp2")),
    Work(Layout("fsdp-full tp4"), bf16, "biases"),
    Work(Layout("zero3 dp2"), fp64),
    Work(Layout("fsdp-full dp2"), fp64),
]

PAIRS = [
    Pair("zero3 tp2 pp2 dp2", "fsdp-full dp4", model="tied"),
    Pair("fsdp-full tp2 dp2", "zero1 dp2"),
    Pair("zero3 dp1", "zero2 dp8", model="biases"),
    Pair("fsdp-gradient dp8", "zero0 dp1", model="tied"),
    Pair("zero2 interleaved pp2", "fsdp-full pp2", model="tied"),
    Pair("fsdp-full dp2", "zero2 tp4", model="biases"),
    Pair("zero2-offload dp2", "zero3 dp3"),
    Pair("zero3 dp2", "zero2-offload pp2", model="tied"),
    Pair("zero0 dp2", "fsdp-full tp2", fp64),
    Pair("fsdp-full replicate2 dp4", "zero1 dp3"),
    Pair("zero1 dp1", "fsdp-full dp1", bf16),
]
PAIRS_LONG = [
    Pair("zero1 tp4", "zero3 tp2 dp2"),
    Pair("zero3 tp2 pp2 dp2", "zero1 dp1"),
    Pair("zero2 dp1", "fsdp-full tp2 pp2 dp2", model="tied"),
    Pair("fsdp-full dp1", "zero3 dp8"),
    Pair("zero1 dp8", "zero3 dp1", model="biases"),
    Pair("zero3 interleaved pp2 dp2", "zero1 pp2 dp2"),
    Pair("fsdp-gradient interleaved pp2 tp2", "zero2 pp4"),
    Pair("zero1 dp2", "fsdp-full interleaved pp2 dp2", model="tied"),
    Pair("zero3 tp4", "fsdp-gradient tp4"),
    Pair("fsdp-gradient tp4", "zero1 tp4", model="biases"),
    Pair("zero2 dp3", "zero1 pp2 dp2", model="tied"),
    Pair("zero3-offload dp2", "zero3 dp2"),
    Pair("zero1-offload dp2", "zero1 dp3"),
    Pair("zero2-offload tp2 dp2", "fsdp-gradient dp2"),
    Pair("fsdp-full dp2", "zero3-offload dp2", model="tied"),
    Pair("zero1 dp2", "zero1-offload pp2 dp2"),
    Pair("zero3 dp2", "fsdp-gradient replicate2 dp4"),
    Pair("fsdp-full tp2 dp2", "fsdp-gradient pp2 dp2", fp64, "tied"),
    Pair("fsdp-full dp2", "zero1 pp2", fp64),
    Pair("zero3 dp2", "fsdp-full dp3", fp64),
    Pair("fsdp-gradient dp2", "zero1 dp2", bf16),
    Pair("zero1 dp2", "fsdp-full tp2 dp2", bf16),
    Pair("zero2 dp2", "zero3 tp2", bf16),
    Pair("fsdp-gradient dp2", "zero1 pp2", bf16, "tied"),
    Pair("zero3 tp2 pp2", "fsdp-full dp4", bf16),
    Pair("fsdp-full dp3", "zero3-offload dp2", bf16, "biases"),
]


def continues_to_the_bit(runs: Runs, work: Work) -> None:
    saved = runs.of(work, until=STEPS)
    loaded = runs.through(work, saved.folders, twice=True)
    assert loaded.curves[0].losses == saved.curves[0].losses[SAVED_STEP:]
    assert loaded.curves[0].gradient_norms == saved.curves[0].gradient_norms[SAVED_STEP:]
    assert_same_state(saved.folders[0], loaded.folders[0], work.config)


@pytest.mark.parametrize("work", SAME, ids=str)
def test_the_same_layout_continues_to_the_bit(runs: Runs, work: Work) -> None:
    continues_to_the_bit(runs, work)


@pytest.mark.long
@pytest.mark.parametrize("work", SAME_LONG, ids=str)
def test_the_same_layout_continues_to_the_bit_in_the_rest(runs: Runs, work: Work) -> None:
    continues_to_the_bit(runs, work)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_another_layout_continues_with_the_same_numbers(runs: Runs, pair: Pair) -> None:
    found = measure(runs, pair)
    assert found.holds, found


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS_LONG, ids=str)
def test_another_layout_continues_with_the_same_numbers_in_the_rest(runs: Runs, pair: Pair) -> None:
    found = measure(runs, pair)
    assert found.holds, found


@pytest.mark.long
def test_through_many_layouts_and_back(runs: Runs) -> None:
    names = (
        "zero2 dp1",
        "fsdp-full dp2",
        "zero1 dp2",
        "fsdp-gradient dp1",
        "fsdp-full dp3",
        "zero3-offload dp3",
        "zero3 tp2 pp2",
        "zero0 dp1",
        "fsdp-full interleaved pp2 dp2",
        "zero2 tp4",
        "zero3 dp2",
    )
    works = [Work(Layout(name), model="tied") for name in names]
    saved = came = runs.of(works[-1], until=STEPS)
    for work in works:
        came = runs.through(work, came.folders)
    assert_same_state(saved.folders[0], came.folders[0], works[-1].config)
    assert came.curves[0].losses == saved.curves[0].losses[SAVED_STEP:]


LARGE = replace(
    samples.MODEL, vocab_size=16_384, hidden_size=256, intermediate_size=1024, num_layers=2, tie_embeddings=True
)
"""Mostly embedding: 74 MB of state, much of it in tensors that every rank needs a contiguous part of."""


def save_large(run_dir: Path) -> Path:
    """The task: a fresh engine's state, saved."""
    return save(make_engine(zero(2), Precision.fp32, model=LARGE), run_dir)


def load_large(folder: Path) -> tuple[int, int, int]:
    """The task: bytes that this rank needs of a checkpoint, that it reads, and in how many contiguous reads."""
    engine = make_engine(FsdpConfig(), Precision.fp32, model=LARGE, parallel=ParallelConfig(tensor=2))
    reader = CheckpointReader(folder)
    with mock.patch.object(Piece, "calls", autospec=True, side_effect=Piece.calls) as reads:
        engine.load_shards(reader)
    needed = sum(tensor.nbytes for shard in engine.shards() for tensor in shard.tensors.values())
    return needed, reader.bytes_read, reads.call_count


def test_each_rank_reads_only_what_it_needs(pool: Pool, tmp_path: Path) -> None:
    folder, *_ = pool.run(save_large, ranks=3, run_dir=tmp_path)
    for needed, read, reads in pool.run(load_large, ranks=4, folder=folder):
        assert needed <= read <= 1.02 * needed + 2 * CHUNK_BYTES * reads
