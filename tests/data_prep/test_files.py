"""Files and folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest
import xxhash

from megatrain.data_prep.files import AtomicFile, AtomicFolder, is_whole, said
from megatrain.errors import GaveUp
from tests.data_prep.running import largest_file


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
    full = pytest.raises(GaveUp, match="/file: can't be written: File too large")
    with largest_file(50), full, AtomicFile(tmp_path / "file") as file:
        file.write(bytes(100))
    assert not list(tmp_path.iterdir())


def write_folder(path: Path, content: bytes = b"content") -> None:
    with AtomicFolder(path) as folder:
        folder.file("a").write(content)
        folder.file("b")
        assert not path.exists()
        folder.commit("key", {"count": 3})


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path)
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
    assert (path / "a").read_bytes() == b"content"
    assert (path / "b").read_bytes() == b""
    assert said(path) == {"count": 3}
    assert is_whole(path, "key")
    assert not is_whole(path, "other")
    assert not is_whole(tmp_path / "none", "key")


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "record"])
def test_damage_to_a_folder_is_seen(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "folder"
    write_folder(path)
    match damage:
        case "altered":
            (path / "a").write_bytes(b"contenT")
        case "cut":
            (path / "a").write_bytes(b"conten")
        case "missing":
            (path / "b").unlink()
        case "record":
            (path / "record.json").write_text(json.dumps({"key": "key"}))
    assert not is_whole(path, "key")


def test_who_comes_second_leaves_the_first_ones(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path)
    with AtomicFolder(path) as second:
        second.file("a").write(b"content")
        second.commit("key", {"count": 4})
    assert said(path) == {"count": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_nothing_is_left_of_a_folder_that_was_not_committed(tmp_path: Path) -> None:
    with AtomicFolder(tmp_path / "folder") as folder:
        folder.file("a").write(b"content")
    assert not list(tmp_path.iterdir())
