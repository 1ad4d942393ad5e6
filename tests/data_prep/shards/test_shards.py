"""Shards cut from the results of units: their bytes depend on the documents alone."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.format import Member, ShardEntry, index_path, member_arrays, metadata_path, shard_name
from megatrain.data_prep.files import AtomicFolder
from megatrain.data_prep.results import METADATA, Results, ResultsWriter
from megatrain.data_prep.shards.cut import cut
from megatrain.data_prep.shards.write import ShardTask, read_record, write_shard

ID_TYPE = np.dtype("<u2")
Row = dict[str, str | None]


def write_units(folder: Path, lengths: list[int], unit: int, rows: list[Row]) -> list[Path]:
    """The results of units of so many documents, whose ids count up through all of them."""
    units = []
    ids = np.arange(sum(lengths)).astype(ID_TYPE)
    for first in range(0, len(lengths), unit):
        part = np.array(lengths[first : first + unit], "<u4")
        begin = sum(lengths[:first])
        with AtomicFolder(folder / f"unit-{first}") as results:
            writer = ResultsWriter(results)
            metadata = pa.RecordBatch.from_pylist(rows[first : first + unit], METADATA)
            writer.add("train", ids[begin : begin + part.sum()], part, metadata)
            writer.close()
            results.commit("key", {})
        units.append(folder / f"unit-{first}")
    return units


def plan(folder: Path, units: list[Path], most_member: int, most_shard: int) -> list[ShardTask]:
    folder.mkdir()
    lengths = [(str(unit), Results(unit, "train", ID_TYPE).lengths) for unit in units]
    return [
        ShardTask(
            "key",
            str(folder / shard_name(number)),
            str(folder / f"{number}.record"),
            "train",
            "uint16",
            each.parts,
            each.members,
            each.tokens,
        )
        for number, each in enumerate(cut(lengths, 2, most_member, most_shard))
    ]


def write_all(tasks: list[ShardTask]) -> list[ShardEntry]:
    for task in reversed(tasks):
        assert write_shard(task) == (sum(task.members), task.tokens)
    return [read_record(task).entry for task in tasks]


def members_of(folder: Path, entry: ShardEntry) -> list[Member]:
    index = json.loads(index_path(folder / entry.name).read_bytes())
    return [Member(**member) for member in index["members"]]


def row(name: object, source: str | None = "web", language: str | None = "en") -> Row:
    return {"id": str(name), "url": None, "source": source, "language": language, "metadata": None}


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    units=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    member_tokens=st.integers(1, 40),
    most_shard=st.integers(1, 20_000),
)
def test_documents_come_back_and_units_leave_no_trace(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    units: tuple[int, int],
    member_tokens: int,
    most_shard: int,
) -> None:
    folder = tmp_path_factory.mktemp("split")
    entries = []
    for name, unit in zip("ab", units, strict=True):
        written = write_units(folder / f"units {name}", lengths, unit, [row(n) for n in range(len(lengths))])
        entries.append(write_all(plan(folder / name, written, 2 * member_tokens, most_shard)))
    assert entries[0] == entries[1]

    found, names, groups = [], [], []
    for entry in entries[0]:
        data = (folder / "a" / entry.name).read_bytes()
        members = members_of(folder / "a", entry)
        assert len(data) == entry.bytes
        assert entry.bytes <= most_shard or len(members) == 1
        parquet = pq.ParquetFile(metadata_path(folder / "a" / entry.name))
        for number, member in enumerate(members):
            ids, document_lengths = member_arrays(data, member, ID_TYPE)
            found += [part.tolist() for part in np.split(ids, np.cumsum(document_lengths))[:-1]]
            names += parquet.read_row_group(number)["id"].to_pylist()
            groups.append(document_lengths.tolist())
        assert parquet.num_row_groups == len(members)
    ends = np.cumsum(lengths)
    assert found == [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    assert names == [str(n) for n in range(len(lengths))]
    assert all(sum(group) <= member_tokens or len(group) == 1 for group in groups)
    assert all(sum(group) + after[0] > member_tokens for group, after in pairwise(groups))


def test_shards_are_filled(tmp_path: Path) -> None:
    """No shard could have taken the first member of the next."""
    lengths = [7, 30, 2, 9, 30, 30, 1, 4, 22] * 4
    units = write_units(tmp_path / "units", lengths, 5, [row(n) for n in range(len(lengths))])
    tasks = plan(tmp_path / "set", units, 60, 8_000)
    entries = write_all(tasks)
    assert len(entries) > 3
    assert all(entry.bytes + 2 * 1024 > 8_000 for entry in entries[:-1])  # a member: two headers and two blocks


def test_a_shard_names_the_source_that_all_its_documents_share(tmp_path: Path) -> None:
    rows = [row(0, "web"), row(1, "books"), row(2, "books", None)]
    units = write_units(tmp_path / "units", [3, 1, 1], 3, rows)
    apart = plan(tmp_path / "apart", units, 2, 1)
    assert [(each.source, each.language) for each in write_all(apart)] == [
        ("web", "en"),
        ("books", "en"),
        ("books", None),
    ]
    (together,) = plan(tmp_path / "together", units, 100, 100_000)
    write_shard(together)
    record = read_record(together)
    assert (record.entry.source, record.entry.language) == (None, None)
    assert record.counts == [("books", None, 1, 1), ("books", "en", 1, 1), ("web", "en", 1, 3)]


@pytest.mark.parametrize("damaged", ["shard-000000.tar", "shard-000000.json", "shard-000000.parquet", "0.record"])
def test_a_shard_that_is_whole_is_not_written_again(tmp_path: Path, damaged: str) -> None:
    units = write_units(tmp_path / "units", [3, 4], 2, [row(0), row(1)])
    (task,) = plan(tmp_path / "set", units, 100, 100_000)
    write_shard(task)
    files = {path: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "set").iterdir()}
    write_shard(task)
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in files} == files
    path = tmp_path / "set" / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    write_shard(task)
    assert {path: path.read_bytes() for path in files} == {path: data for path, (data, _) in files.items()}
    write_shard(replace(task, key="other"))
    assert all(path.stat().st_ino != inode for path, (_, inode) in files.items())
