"""Damaged sets, local and remote, through the loader: each damage as an error and as what is skipped, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatrain.batch import IGNORE
from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data.format import ShardSet
from megatrain.data.loader import Loader, RankBatch, digest
from megatrain.data.plan import Plan
from megatrain.data.reader import BadMember
from megatrain.data.samples import SampleOrder, open_sources, take_bad_members
from megatrain.data_config import CacheConfig, DataConfig, RemoteConfig, WhenBad
from megatrain.errors import GaveUp, InputError
from megatrain.objectives import build
from tests.data.http_server import serve
from tests.data.sets import EOS, flip_a_bit, write_set

LENGTH = 6
SIZE = 5
STEPS = 8
SHARDS = [[[30], [20, 11]], [[12], [31]], [[41]]]
"""Three shards of 61, 43 and 41 tokens: samples 0 to 9, 10 to 16 and 17 to 23."""


@pytest.fixture(params=["local", "http"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ShardSet, DataConfig]]:
    """A set, and the configuration that reads it."""
    shards = write_set(tmp_path / "set", SHARDS)
    data = DataConfig(
        path=str(tmp_path / "set"),
        remote=RemoteConfig(retries=0),
        cache=CacheConfig(path=str(tmp_path / "cache")),
    )
    if request.param == "local":
        yield shards, data
    else:
        with serve(tmp_path) as server:
            data.path = f"{server.url}/set"
            yield shards, data


def flip(shards: ShardSet) -> None:
    """In the second member of the second shard, which has part of samples 11 to 16."""
    flip_a_bit(shards, 1, 1)


def cut_off(shards: ShardSet) -> None:
    """Within the same member."""
    os.truncate(shards.path(1), shards.members(1)[1].tokens_offset + 2)


def remove(shards: ShardSet) -> None:
    shards.path(1).unlink()


Damage = Callable[[ShardSet], None]
BAD = range(11, 17)


def run(data: DataConfig, rank: int = 0, ranks: int = 1) -> tuple[list[RankBatch], list[str]]:
    """Some steps of one rank, and the bad members that it skipped."""
    sources = open_sources(data, LENGTH)
    plan = Plan(TrainConfig(sequence_length=LENGTH, global_batch_size=SIZE, data=data), sources)
    loader = Loader(plan, build(ObjectiveConfig(), document_mask=False), plan.state(0), rank=rank, ranks=ranks)
    try:
        batches = [next(loader) for _ in range(STEPS)]
        return batches, [line for batch in batches for line in batch.bad_members]
    finally:
        loader.close()


@pytest.mark.parametrize("damage", [flip, cut_off])
def test_bad_members_keep_their_place_on_all_ranks(opened: tuple[ShardSet, DataConfig], damage: Damage) -> None:
    shards, data = opened
    order = SampleOrder(open_sources(data, LENGTH), seed=0)
    whole, none_bad = run(data)
    assert none_bad == []
    damage(shards)
    data.bad_member = WhenBad.skip
    data.cache.path = f"{data.cache.path}-empty"
    alone, lines = run(data)
    assert len(lines) == 1
    assert lines[0].startswith(f"{data.path}/train/shard-000001.tar: member 000001 ")
    ranks = [run(data, rank, ranks=2) for rank in range(2)]
    for step, (before, after, *parts) in enumerate(zip(whole, alone, ranks[0][0], ranks[1][0], strict=True)):
        n = np.arange(step * SIZE, (step + 1) * SIZE)
        bad = np.isin(order.locate(n)[1], BAD)
        for place, (good, now) in enumerate(zip(before.micro_batches, after.micro_batches, strict=True)):
            assert (now.targets == IGNORE).all() == bad[place]
            assert (now.input_ids == EOS).all() == bad[place]
            assert bad[place] or (now.input_ids == good.input_ids).all()
        assert (before.digest == after.digest) == (not bad.any())
        assert sum(part.digest for part in parts) % 2**64 == after.digest
        padding = np.full((SIZE, LENGTH + 1), EOS, np.int32)
        assert not bad.all() or after.digest == digest(n, padding)
    assert {line for _, seen in ranks for line in seen} == set(lines)


@pytest.mark.parametrize("damage", [flip, cut_off])
def test_a_bad_member_is_an_error_unless_told_otherwise(opened: tuple[ShardSet, DataConfig], damage: Damage) -> None:
    shards, data = opened
    damage(shards)
    for rank in range(2):
        with pytest.raises(GaveUp if damage is flip else InputError) as raised:
            run(data, rank, ranks=2)
        assert str(raised.value).startswith(f"{data.path}/train/shard-000001.tar: ")
        assert isinstance(raised.value, BadMember) == (damage is flip)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("when_bad", WhenBad)
def test_a_missing_shard_is_an_error_always(opened: tuple[ShardSet, DataConfig], when_bad: WhenBad) -> None:
    shards, data = opened
    data.bad_member = when_bad
    sources = open_sources(data, LENGTH)
    remove(shards)
    with pytest.raises(InputError, match=r"/shard-000001\.tar: missing, and the manifest lists it"):
        open_sources(data, LENGTH)
    with pytest.raises(GaveUp, match=r"/shard-000001\.tar: .*(missing|No such file)"):
        SampleOrder(sources, seed=0).read(np.arange(24))
    assert take_bad_members(sources) == []
