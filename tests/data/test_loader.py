from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.batch import IGNORE, Batch
from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data.format import HELD_OUT, ShardSet
from megatrain.data.loader import Loader, RankBatch, held_out_batches
from megatrain.data.plan import Plan
from megatrain.data.samples import SampleOrder, Source, open_sources
from megatrain.data_config import DataConfig, SourceConfig
from megatrain.errors import GaveUp
from megatrain.objectives import build
from tests.data.sets import EOS, flip_a_bit, row, write_set

LENGTH = 6
SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; in "long" some pack units and some samples end early."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "long", [[[5, 11, 3], [20, 1, 1]], [[2, 40]]])
    write_set(folder / "short", [[[4, 4, 4]]])
    write_set(folder / "held", [[[30, 10]]], split=HELD_OUT)
    return folder


def one_source(folder: Path, length: int = LENGTH, max_epochs: float | None = None) -> list[Source]:
    config = DataConfig(sources={"long": SourceConfig(path=str(folder), max_epochs=max_epochs)})
    return open_sources(config, length)


def two_sources(folder: Path) -> list[Source]:
    long = SourceConfig(path=str(folder / "long"), weight=2.0, max_epochs=1.5)
    short = SourceConfig(path=str(folder / "short"), max_epochs=3.0)
    return open_sources(DataConfig(sources={"long": long, "short": short}), LENGTH)


def run(
    sources: list[Source],
    size: int,
    micro: int = 1,
    rank: int = 0,
    ranks: int = 1,
    n: int = 0,
    document_mask: bool = True,
    steps: int | None = None,
) -> list[RankBatch]:
    """The steps of one rank from sample n on."""
    config = TrainConfig(
        seed=SEED,
        sequence_length=sources[0].index.sequence_length,
        global_batch_size=size,
        micro_batch_size=micro,
        data=DataConfig(sources={source.name: source.config for source in sources}),
    )
    plan = Plan(config, sources)
    loader = Loader(plan, build(ObjectiveConfig(), document_mask), {**plan.state(0), "n": n}, rank=rank, ranks=ranks)
    try:
        taken: list[RankBatch] = []
        while len(taken) != steps and (batch := next(loader, None)) is not None:
            assert loader.state()["n"] == batch.last + 1
            taken.append(batch)
        return taken
    finally:
        loader.close()


def samples(batches: list[Batch]) -> Counter[tuple[tuple[int, ...], ...]]:
    """The samples with targets in micro-batches, each as its inputs, targets, positions and source."""
    return Counter(
        (tuple(inputs), tuple(targets), tuple(positions), (source,))
        for batch in batches
        for inputs, targets, positions, source in zip(
            batch.input_ids.tolist(),
            batch.targets.tolist(),
            batch.positions.tolist(),
            batch.source.tolist(),
            strict=True,
        )
        if set(targets) != {IGNORE}
    )


def predicted(steps: list[RankBatch]) -> Counter[int]:
    """How often each id is a target."""
    targets = torch.cat([batch.targets.flatten() for step in steps for batch in step.micro_batches])
    return Counter(targets[targets != IGNORE].tolist())


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("length", [1, 6, 100])
def test_an_epoch_predicts_every_token_once(folder: Path, document_mask: bool, length: int) -> None:
    sources = one_source(folder / "long", length, max_epochs=1)
    ids, document = row(ShardSet(folder / "long" / "train", sources[0].manifest))
    place = np.arange(len(ids))
    # Without the mask: the first id of each pack unit; at these lengths a unit is a shard.
    unpredicted = document == place if document_mask else np.isin(place, [0, 41])
    assert predicted(run(sources, 7, 2, document_mask=document_mask)) == Counter(ids[~unpredicted].tolist())
    assert Counter(ids.tolist())[EOS] == 8
    assert set(Counter(ids[ids != EOS].tolist()).values()) == {1}


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 13),
    micro=st.integers(1, 5),
    ranks=st.integers(1, 4),
    n=st.integers(0, 40),
)
def test_ranks_slice_the_same_order(folder: Path, size: int, micro: int, ranks: int, n: int) -> None:
    sources = two_sources(folder)
    alone = run(sources, size, 1, n=n)
    parts = [run(sources, size, micro, rank, ranks, n=n) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(alone)}
    for whole, *slices in zip(alone, *parts, strict=True):
        assert {(part.first, part.last, part.samples) for part in slices} == {(whole.first, whole.last, whole.samples)}
        assert sum(part.digest for part in slices) % 2**64 == whole.digest
        assert len({len(part.micro_batches) for part in slices}) == 1
        batches = [batch for part in slices for batch in part.micro_batches]
        assert {len(batch.input_ids) for batch in batches} == {micro}
        assert samples(batches) == samples(whole.micro_batches)


def test_the_data_end_when_all_sources_are_used_up(folder: Path) -> None:
    sources = two_sources(folder)
    total = sum(round(s.index.samples * (s.config.max_epochs or 0)) for s in sources)
    steps = run(sources, 8)
    assert [step.first for step in steps] == list(range(0, total, 8))
    assert steps[-1].last == total - 1
    assert steps[-1].samples == total - 8 * (len(steps) - 1) < 8


@pytest.mark.parametrize("n", [3, 21, 10**12])
def test_a_resumed_run_is_the_tail_of_the_unbroken_one(folder: Path, n: int) -> None:
    sources = one_source(folder / "long")
    whole = run(sources, 3, n=n, steps=6)
    tail = run(sources, 3, n=n + 6, steps=4)
    assert [step.digest for step in tail] == [step.digest for step in whole[2:]]
    for step, other in zip(tail, whole[2:], strict=True):
        assert all(
            torch.equal(getattr(a, field), getattr(b, field))
            for a, b in zip(step.micro_batches, other.micro_batches, strict=True)
            for field in ("input_ids", "targets", "positions", "start", "source")
        )


def test_the_digest_is_that_of_the_law(folder: Path) -> None:
    sources = one_source(folder / "long", max_epochs=1)
    order = SampleOrder(sources, SEED)
    step = run(sources, 5, 2, n=2, steps=1)[0]
    rows = [order.read(np.array([n])).ids[0].astype("<i4").tobytes() for n in range(2, 7)]
    assert step.digest == sum(xxhash.xxh3_64(data, seed=n).intdigest() for n, data in enumerate(rows, 2)) % 2**64


def test_the_digests_are_what_they_always_were(folder: Path) -> None:
    """The whole of law 2: format, mixture, permutation, cutting and padding, down to the ids."""
    digests = [f"{step.digest:016x}" for step in run(two_sources(folder), 8, steps=3)]
    assert digests == ["53e0f88797f7fe2e", "a4f583cf977a4f07", "18d010ef5d5da958"]


def test_empty_samples_have_no_targets(folder: Path) -> None:
    sources = one_source(folder / "long")
    step = run(sources, 5, micro=2, rank=1, ranks=2, steps=1)[0]
    full, empty = step.micro_batches  # places 2 and 3, and 6 and 7 of five
    assert (full.targets != IGNORE).any(dim=1).all()
    assert (empty.targets == IGNORE).all()
    assert (empty.input_ids == EOS).all()
    assert (empty.start == 0).all()


def test_an_altered_member_ends_the_run_at_its_step(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[40]], [[40]], [[40]]])
    sources = one_source(tmp_path)
    start = sources[0].index.locate(SampleOrder(sources, SEED).locate(np.arange(50))[1]).start
    first_touch = int(np.flatnonzero((start >= 40) & (start < 80))[0])
    flip_a_bit(shards, 1, 0)
    assert len(run(sources, 1, steps=first_touch)) == first_touch
    with pytest.raises(GaveUp, match=r"shard-000001\.tar: member 000000 was altered"):
        run(sources, 1, steps=first_touch + 1)


@pytest.mark.parametrize(("count", "expected"), [(4, 4), (None, 7)])
@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 2), (3, 4)])
def test_held_out_samples_are_sliced_like_others(
    folder: Path, count: int | None, expected: int, micro: int, ranks: int
) -> None:
    sources = open_sources(DataConfig(path=str(folder / "held")), LENGTH, HELD_OUT)
    ids, _ = row(ShardSet(folder / "held" / HELD_OUT, sources[0].manifest))
    objective = build(ObjectiveConfig(), document_mask=False)
    parts = [
        list(held_out_batches(sources, objective, samples=count, micro_batch_size=micro, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    found = samples([batch for part in parts for batch in part])
    assert found.total() == expected
    targets = Counter(id_ for sample in found.elements() for id_ in sample[1] if id_ != IGNORE)
    assert targets == Counter(ids[1 : expected * LENGTH + 1].tolist())
