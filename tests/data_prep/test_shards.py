"""Files that appear whole or not at all, and shards whose bytes depend on the documents alone."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.format import Member, ShardEntry, member_arrays
from megatrain.data_prep.shards import AtomicFile
from megatrain.data_prep.splits import METADATA, SplitWriter
from megatrain.errors import GaveUp


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with AtomicFile(path) as file:
        file.write(b"some ")
        file.write(memoryview(b"bytes"))
        assert not path.exists()
    assert path.read_bytes() == b"some bytes"
    assert file.xxh3_128 == xxhash.xxh3_128_hexdigest(b"some bytes")
    assert file.size == 10


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    half = AtomicFile(tmp_path / "file")
    half.write(b"half of ")
    half.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    full = pytest.raises(GaveUp, match="/file: can't be written: No space left on device")
    with full, AtomicFile(tmp_path / "file") as file:
        file.write(bytes(100))
    assert not list(tmp_path.iterdir())


def write_documents(folder: Path, lengths: list[int], batch: int, **sizes: int) -> list[ShardEntry]:
    """Documents whose ids count up through all of them, given to the writer `batch` at a time."""
    folder.mkdir()
    writer = SplitWriter(folder, **sizes)
    ids = np.arange(sum(lengths)).astype("<u2")
    for first in range(0, len(lengths), batch):
        part = np.array(lengths[first : first + batch], "<u4")
        begin = sum(lengths[:first])
        names = [str(n) for n in range(first, first + len(part))]
        columns = [pa.array(names), *(pa.array(["x"] * len(part)) for _ in METADATA.names[1:])]
        writer.add(ids[begin : begin + part.sum()], part, pa.RecordBatch.from_arrays(columns, schema=METADATA))
    return writer.finish()


def members_of(folder: Path, entry: ShardEntry) -> list[Member]:
    index = json.loads((folder / entry.name).with_suffix(".json").read_bytes())
    return [Member(**member) for member in index["members"]]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    batches=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    member_tokens=st.integers(1, 40),
    shard_bytes=st.integers(1, 20_000),
)
def test_documents_come_back_and_batches_leave_no_trace(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    batches: tuple[int, int],
    member_tokens: int,
    shard_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("split")
    sizes = {"member_bytes": 2 * member_tokens, "shard_bytes": shard_bytes}
    entries = write_documents(folder / "a", lengths, batches[0], **sizes)
    assert write_documents(folder / "b", lengths, batches[1], **sizes) == entries

    found, names, groups = [], [], []
    for entry in entries:
        data = (folder / "a" / entry.name).read_bytes()
        members = members_of(folder / "a", entry)
        assert len(data) == entry.bytes
        assert entry.bytes <= shard_bytes or len(members) == 1
        parquet = pq.ParquetFile((folder / "a" / entry.name).with_suffix(".parquet"))
        for number, member in enumerate(members):
            ids, document_lengths = member_arrays(data, member, np.dtype("<u2"))
            found += [part.tolist() for part in np.split(ids, np.cumsum(document_lengths))[:-1]]
            names += parquet.read_row_group(number)["id"].to_pylist()
            groups.append(document_lengths.tolist())
        assert parquet.num_row_groups == len(members)
    ends = np.cumsum(lengths)
    assert found == [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    assert names == [str(n) for n in range(len(lengths))]
    assert all(sum(group) <= member_tokens or len(group) == 1 for group in groups)
    assert all(sum(group) + after[0] > member_tokens for group, after in pairwise(groups))


def test_a_shard_names_the_source_that_all_its_documents_share(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, member_bytes=2, shard_bytes=1)
    for source in ("web", "books"):
        row = {"id": "n", "url": None, "source": source, "language": "en", "metadata": None}
        writer.add(np.array([1], "<u2"), np.array([1], "<u4"), pa.RecordBatch.from_pylist([row], METADATA))
    assert [(entry.source, entry.language) for entry in writer.finish()] == [("web", "en"), ("books", "en")]
    mixed = SplitWriter(tmp_path, member_bytes=100, shard_bytes=10_000)
    rows = [{"id": "n", "source": source, "language": None} for source in ("web", None)]
    mixed.add(np.array([1, 2], "<u2"), np.array([1, 1], "<u4"), pa.RecordBatch.from_pylist(rows, METADATA))
    assert [(entry.source, entry.language) for entry in mixed.finish()] == [(None, None)]


def test_discarding_leaves_the_committed_shards_alone(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, member_bytes=2, shard_bytes=1)
    rows = pa.RecordBatch.from_pylist([{"id": "n"}] * 3, METADATA)
    writer.add(np.array([1, 2, 3], "<u2"), np.array([1, 1, 1], "<u4"), rows)
    writer.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-000000.json",
        "shard-000000.parquet",
        "shard-000000.tar",
    ]
