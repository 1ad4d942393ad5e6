from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from megatrain.data import sequences
from megatrain.data.sequences import open_concat, read_members
from megatrain.data.tables import Column, by_processes, open_table, set_table, write_table
from megatrain.errors import GaveUp, InputError
from tests.data.sets import write_set

KEY: dict[str, str | int] = {"version": 1, "name": "numbers"}
LARGE, EMPTY = np.arange(300_000, dtype=np.int64), np.empty(0, np.int32)


def columns() -> list[Column]:
    """One of two parts, one that is empty, and one of bytes."""
    return [("large", "<i8", np.split(LARGE, [7])), ("empty", "<i4", [EMPTY]), ("bytes", "u1", [LARGE[:5]])]


def double_or_die(number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def test_columns_are_mapped_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "numbers.index"
    write_table(path, KEY, columns())
    found = open_table(path, KEY)
    assert found is not None
    assert [(name, column.dtype.str) for name, column in found.items()] == [
        ("bytes", "|u1"),
        ("empty", "<i4"),
        ("large", "<i8"),
    ]
    assert np.array_equal(found["large"], LARGE)
    assert found["empty"].size == 0
    assert found["bytes"].tolist() == [0, 1, 2, 3, 4]
    assert not found["large"].flags.writeable


def test_another_key_or_a_damaged_file_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "numbers.index"
    assert open_table(path, KEY) is None
    write_table(path, KEY, columns())
    assert open_table(path, {**KEY, "version": 2}) is None
    whole = path.read_bytes()
    for place in (0, 2_000_000, len(whole) - 1, len(whole) - 9, len(whole) - 100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert open_table(path, KEY) is None
    for size in (0, 7, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert open_table(path, KEY) is None
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert open_table(path, KEY, unverified={"large"}) is not None


def test_a_table_that_cant_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Column]:
        yield "large", "<i8", [LARGE]
        raise GaveUp("no more")

    with pytest.raises(GaveUp, match="no more"):
        write_table(tmp_path / "numbers.index", KEY, broken())
    assert list(tmp_path.iterdir()) == []


def test_those_who_want_a_table_at_once_make_it_once(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[5, 6]]])
    made: list[int] = []

    def make() -> list[Column]:
        made.append(1)
        return columns()

    openers = [threading.Thread(target=set_table, args=(shards, None, "numbers", make)) for _ in range(8)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert made == [1]
    names = sorted(path.name for path in shards.folder.iterdir() if "shard" not in path.name)
    assert names == ["manifest.json", f"numbers-{shards.manifest.sha256[:16]}.index"]  # no lock, no temporary file


def test_a_folder_that_cant_be_written_is_named(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[5, 6]]])
    with pytest.raises(
        InputError, match=r"data\.index_path=.*missing: numbers-.*\.index can't be written there \(No su"
    ):
        set_table(shards, str(tmp_path / "missing"), "numbers", columns)


def test_processes_give_results_in_order_and_their_death_is_told() -> None:
    assert list(by_processes(double_or_die, range(5), 2)) == [0, 2, 4, 6, 8]
    with pytest.raises(GaveUp, match="was killed"):
        list(by_processes(double_or_die, [1, -1, 2], 2))


def test_a_large_set_is_the_same_from_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path, [[[5, 1, 9], [4]], [], [[300], [2, 2, 2, 2], [1, 8]], [[7, 7]]])
    members = read_members(shards)
    index = open_concat(shards, members, 1)
    monkeypatch.setattr(sequences, "IN_MEMORY_SHARDS", 3)
    monkeypatch.setattr(sequences, "SHARDS_A_TASK", 1)
    for _ in range(2):
        kept = read_members(shards)
        for field in fields(members):
            assert np.array_equal(getattr(kept, field.name), getattr(members, field.name)), field.name
        again = open_concat(shards, kept, 1)
        assert again.samples == index.samples
        sample = np.arange(index.samples)
        assert np.array_equal(again.locate(sample).start, index.locate(sample).start)
        assert np.array_equal(again.locate(sample).stop, index.locate(sample).stop)
    assert sorted(path.name.partition("-")[0] for path in shards.folder.glob("*.index")) == ["concat", "members"]
    with pytest.raises(InputError, match=r"data\.index_path=/proc: members-"):
        read_members(shards, "/proc")
