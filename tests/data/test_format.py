"""The shard format: what docs/format.md says, by readers that know nothing of ours, and every way to be wrong."""

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from megatrain.data.format import (
    HELD_OUT,
    Manifest,
    ShardEntry,
    ShardList,
    id_dtype_name,
    index_path,
    member_arrays,
    member_digest,
    open_set,
)
from megatrain.data_prep.shards.manifest import write_manifest
from megatrain.errors import GaveUp, InputError
from tests.data.sets import write_set

SHARDS = [[[3, 5], [700]], [[1]]]
"""Two shards, of two members and one; documents by their tokens."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path, SHARDS, vocab_size=1000)
    return tmp_path


def edit_manifest(folder: Path, **changes: object) -> None:
    """Writes another manifest over the one of the train split, with a right sha256."""
    value = json.loads((folder / "train/manifest.json").read_bytes())
    del value["sha256"]
    value["shards"] = ShardList.of(ShardEntry(**shard) for shard in value["shards"])
    write_manifest(folder / "train", Manifest(**value | changes))


def test_round_trip(folder: Path) -> None:
    opened = open_set(folder)
    assert opened.id_dtype == np.dtype("<u2")
    assert (opened.manifest.tokens, opened.manifest.documents, opened.manifest.eos_id) == (709, 4, 0)
    assert [(member.tokens, member.documents) for member in opened.members(0)] == [(8, 2), (700, 1)]
    assert [member.name for member in opened.members(0)] == ["000000", "000001"]
    member = opened.members(0)[0]
    ids, lengths = member_arrays(opened.path(0).read_bytes(), member, opened.id_dtype)
    assert ids.tolist() == [1, 2, 0, 4, 5, 6, 7, 0]
    assert lengths.tolist() == [3, 5]
    assert member_digest(ids.data, lengths.data) == member.xxh3_128


def test_a_split_folder_opens_by_itself(folder: Path) -> None:
    assert open_set(folder / "train").manifest == open_set(folder).manifest
    assert open_set(folder / "train").tokenizer.samefile(folder / "tokenizer.json")


def test_shards_are_listed_in_order_and_in_parts(folder: Path) -> None:
    shards = open_set(folder).manifest.shards
    entries = list(shards)
    assert [entry.name for entry in entries] == ["shard-000000.tar", "shard-000001.tar"]
    assert [shards[0], shards[1]] == entries
    assert ShardList.of(entries) == shards
    assert [list(shards.part(first, first + 1)) for first in (0, 1)] == [entries[:1], entries[1:]]
    assert list(shards.part(1, 100)) == entries[1:]


def test_stock_webdataset_reads_every_sample(folder: Path) -> None:
    paths = [str(folder / "train" / name) for name in ("shard-000000.tar", "shard-000001.tar")]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000", "000001", "000000"]
    assert np.frombuffer(samples[0]["tokens"], "<u2").tolist() == [1, 2, 0, 4, 5, 6, 7, 0]
    assert np.frombuffer(samples[1]["lengths"], "<u4").tolist() == [700]


def test_tars_are_plain_and_aligned(folder: Path) -> None:
    path = folder / "train/shard-000000.tar"
    with tarfile.open(path) as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == ["000000.tokens", "000000.lengths", "000001.tokens", "000001.lengths"]
    fields = {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode, e.offset_data % 512) for e in entries}
    assert fields == {(0, 0, 0, "", "", 0o644, 0)}
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    assert [(m.tokens_offset, m.lengths_offset) for m in open_set(folder).members(0)] == [
        (entries[0].offset_data, entries[1].offset_data),
        (entries[2].offset_data, entries[3].offset_data),
    ]


def test_equal_input_gives_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "again", SHARDS, vocab_size=1000)
    for path in (folder / "train").iterdir():
        assert path.read_bytes() == (tmp_path / "again/train" / path.name).read_bytes()


def test_hashes_are_what_the_document_says(folder: Path) -> None:
    value = json.loads((folder / "train/manifest.json").read_bytes())
    stated = value.pop("sha256")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == stated == open_set(folder).manifest.sha256
    tar = (folder / "train/shard-000000.tar").read_bytes()
    index = (folder / "train/shard-000000.json").read_bytes()
    assert value["shards"][0]["xxh3_128"] == xxhash.xxh3_128_hexdigest(tar)
    assert value["shards"][0]["index_xxh3_128"] == xxhash.xxh3_128_hexdigest(index)
    member = json.loads(index)["members"][0]
    payloads = tar[512 : 512 + 16] + tar[1536 : 1536 + 8]
    assert member["xxh3_128"] == xxhash.xxh3_128_hexdigest(payloads)


def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path) -> None:
    assert [id_dtype_name(size) for size in (2, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    opened = write_set(tmp_path, [[[2]]], vocab_size=65537)
    assert opened.id_dtype == np.dtype("<u4")
    assert opened.members(0)[0].lengths_offset == 512 + 512 + 512


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no train/manifest\.json in it"):
        open_set(tmp_path)


def test_held_out_is_never_taken_for_train(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train: holds the split train, and held_out was asked for"):
        open_set(folder / "train", HELD_OUT)
    with pytest.raises(InputError, match=r"no held_out/manifest\.json"):
        open_set(folder, HELD_OUT)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tokens": 709', '"tokens": 710', "altered since it was written"),
        ('"version": 1', '"version": 2', "version 2 of the format, and this program reads version 1"),
        ('"eos_id"', '"eos"', "not a manifest of version 1"),
        ('"members"', '"member"', "not a manifest of version 1: its shards have name, bytes, members, .* not name, "),
        ("{", "[", "not a manifest"),
        ('"sha256"', '"sha"', "not a manifest"),
    ],
)
def test_a_damaged_manifest(folder: Path, old: str, new: str, message: str) -> None:
    path = folder / "train/manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=f"manifest.json: {message}"):
        open_set(folder)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_names_stay_in_the_folder(folder: Path, name: str) -> None:
    shards = open_set(folder).manifest.shards
    edit_manifest(folder, tokenizer=name)
    with pytest.raises(InputError, match="not a plain file name"):
        open_set(folder)
    edit_manifest(folder, shards=ShardList.of([shards[0], replace(shards[1], name=name)]))
    with pytest.raises(InputError, match="not a plain file name"):
        open_set(folder)


def test_ids_too_small_for_the_vocabulary(folder: Path) -> None:
    edit_manifest(folder, vocab_size=70_000)
    with pytest.raises(InputError, match="id_dtype=uint16: uint32 is for vocab_size=70000"):
        open_set(folder)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.json"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / "train" / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing, and the manifest lists it"):
        open_set(folder)


def test_a_shard_of_another_size(folder: Path) -> None:
    path = folder / "train/shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shard-000001\.tar: has 3071 bytes, and the manifest says 3072"):
        open_set(folder)


def test_another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(InputError, match="not the tokenizer that made the shards"):
        open_set(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: missing"):
        open_set(folder)


def test_an_altered_index_is_found_when_it_is_read(folder: Path) -> None:
    opened = open_set(folder)
    path = index_path(opened.path(0))
    path.write_text(path.read_text().replace('"tokens": 8', '"tokens": 9'))
    with pytest.raises(GaveUp, match=r"shard-000000\.json: altered since the manifest was written"):
        opened.members(0)
    path.unlink()
    with pytest.raises(GaveUp, match=r"shard-000000\.json: can't read the index"):
        opened.members(0)
