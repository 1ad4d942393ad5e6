from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data import reader as reader_module
from megatrain.data.format import open_set
from megatrain.data.order import Int64
from megatrain.data.reader import Reader, TarMaps
from megatrain.data.sequences import read_members
from megatrain.errors import GaveUp
from tests.data.sets import flip_a_bit, row, write_set

Opened = tuple[Reader, list[int], list[int]]
SHARDS = [[[5, 1, 9], [4]], [[30], [2, 2, 2, 2], [1, 8]], [[7, 7]]]


def read(reader: Reader, start: int, stop: int) -> tuple[list[int], list[int]]:
    """The ids of a range, and the places in it where a document begins."""
    ids = np.zeros(stop - start, reader.id_dtype)
    usable, begins = reader.read(np.array([start]), np.array([stop]), np.array([0]), ids)
    assert usable.all()
    return ids.tolist(), begins.tolist()


def usable(reader: Reader, starts: list[int], size: int, expected: Int64) -> list[bool]:
    """Which ranges of `size` tokens can be read, at once; those are the expected ones."""
    start, to = np.array(starts), np.arange(len(starts)) * size
    ids = np.zeros(len(starts) * size, reader.id_dtype)
    found, _ = reader.read(start, start + size, to, ids)
    assert np.array_equal(ids.reshape(-1, size)[found], expected[start[:, None] + np.arange(size)][found])
    return list(found)


@pytest.fixture(scope="module", params=[60_000, 70_000], ids=["uint16", "uint32"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    shards = write_set(tmp_path_factory.mktemp("set"), SHARDS, vocab_size=request.param)
    ids, document = row(shards)
    return Reader(shards, read_members(shards)), ids.tolist(), document.tolist()


@settings(max_examples=100, deadline=None)
@given(bounds=st.tuples(st.integers(0, 80), st.integers(0, 80)).map(sorted))
def test_any_range_is_read_as_it_was_written(opened: Opened, bounds: list[int]) -> None:
    reader, ids, document = opened
    start, stop = bounds
    begins = [i - start for i in range(start, stop) if document[i] == i]
    assert read(reader, start, stop) == (ids[start:stop], begins)


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, 80), min_size=2, max_size=12), data=st.data())
def test_ranges_are_read_at_once_as_one_by_one(opened: Opened, cuts: list[int], data: st.DataObject) -> None:
    reader, ids, document = opened
    ranges = data.draw(st.permutations(list(pairwise(sorted(cuts)))))
    start, stop = np.array(ranges).T
    to = 3 + np.cumsum(stop - start) - (stop - start)
    found = np.zeros(3 + max(cuts) - min(cuts), reader.id_dtype)
    all_usable, begins = reader.read(start, stop, to, found)
    assert all_usable.all()
    places = [i for low, high in ranges for i in range(low, high)]
    assert found.tolist() == [0, 0, 0, *(ids[i] for i in places)]
    assert sorted(begins.tolist()) == [3 + at for at, i in enumerate(places) if document[i] == i]
    _, none = reader.read(start, stop, to, found, documents=False)
    assert none.tolist() == []


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 1)
    monkeypatch.setattr(reader_module, "STARTS_BYTES", 1)
    shards = write_set(tmp_path, SHARDS)
    members = read_members(shards)
    maps = TarMaps(shards, members)
    reader = Reader(shards, members, maps)
    ids = row(shards)[0].tolist()
    for _ in range(2):
        assert read(reader, 0, 80)[0] == ids
    assert maps._map.cache_info().currsize == 1
    assert reader._starts.cache_info().currsize == 1


def test_an_altered_member_is_named_when_it_is_touched_first(tmp_path: Path) -> None:
    shards = write_set(tmp_path, SHARDS)
    reader = Reader(shards, read_members(shards))
    ids = row(shards)[0].tolist()
    flip_a_bit(shards, 1, 1)
    assert read(reader, 0, 49)[0] == ids[:49]  # all before it
    for _ in range(2):
        with pytest.raises(GaveUp, match=r"shard-000001\.tar: member 000001 was altered"):
            read(reader, 48, 50)
    assert read(reader, 57, 80)[0] == ids[57:]


def test_a_bad_member_is_skipped_where_that_was_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = write_set(tmp_path, SHARDS)
    ids = row(shards)[0]
    flip_a_bit(shards, 1, 1)
    reader = Reader(shards, read_members(shards), skip=True)
    starts = list(range(0, 78, 4))
    assert usable(reader, starts, 2, ids) == [not 48 <= start <= 56 for start in starts]
    line = f"{shards.path(1)}: member 000001 was altered since it was written (xxh3-128 differs)"
    assert reader.take_bad() == [line]
    assert reader.take_bad() == []
    assert caplog.messages == [f"{line}; its samples are skipped"]


def test_a_tar_that_was_cut_off_is_skipped_from_there_on(tmp_path: Path) -> None:
    shards = write_set(tmp_path, SHARDS)
    ids = row(shards)[0]
    sizes = {1: shards.members(1)[1].lengths_offset + 4, 2: 0}
    for shard, size in sizes.items():
        os.truncate(shards.path(shard), size)
    shards = open_set(tmp_path, allow_damage=True)
    assert shards.damaged == sizes
    reader = Reader(shards, read_members(shards), skip=True)
    assert usable(reader, list(range(80)), 1, ids) == [start < 49 for start in range(80)]
    assert [line.removeprefix(str(shards.folder)) for line in reader.take_bad()] == [
        f"/shard-00000{shard}.tar: member 00000{member} lies beyond the end of the tar, which was cut off"
        for shard, member in ((1, 1), (1, 2), (2, 0))
    ]


def test_altered_lengths_are_found_too(tmp_path: Path) -> None:
    shards = write_set(tmp_path, SHARDS)
    data = bytearray(shards.path(0).read_bytes())
    data[shards.members(0)[1].lengths_offset] ^= 1
    shards.path(0).write_bytes(data)
    with pytest.raises(GaveUp, match=r"shard-000000\.tar: member 000001 was altered"):
        read(Reader(shards, read_members(shards)), 15, 17)


def test_a_member_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path, SHARDS)
    members = read_members(shards)
    maps = TarMaps(shards, members)
    hashed: list[int] = []
    verify = maps.verify

    def counted(member: int) -> None:
        hashed.append(member)
        verify(member)

    monkeypatch.setattr(maps, "verify", counted)
    reader = Reader(shards, members, maps)
    for start in range(0, 70, 3):
        read(reader, start, start + 3)
    assert hashed == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_shard_that_changed_since_it_was_opened_is_named(tmp_path: Path, damage: str, skip: bool) -> None:
    shards = write_set(tmp_path, SHARDS)
    reader = Reader(shards, read_members(shards), skip=skip)
    if damage == "removed":
        shards.path(2).unlink()
    else:
        shards.path(2).write_bytes(shards.path(2).read_bytes()[:-512])
    with pytest.raises(GaveUp, match=r"shard-000002\.tar"):
        read(reader, 70, 72)


def test_threads_read_the_same(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[3] * 20] * 10] * 4)
    ids = row(shards)[0].tolist()
    reader = Reader(shards, read_members(shards))
    with ThreadPoolExecutor(8) as threads:
        starts = list(range(0, 2300, 7)) * 3
        for start, (found, _) in zip(starts, threads.map(lambda s: read(reader, s, s + 100), starts), strict=True):
            assert found == ids[start : start + 100]
