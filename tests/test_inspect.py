"""`megatrain inspect`: the exit code and the lines for what is whole, what isn't, and what is nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from megatrain.checkpoint.folders import step_folder
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.command_config import InspectConfig
from megatrain.data.format import HELD_OUT, TOKENIZER, TRAIN, Manifest, ShardList, metadata_path, shard_name
from megatrain.data_config import Packing
from megatrain.data_prep.shards.manifest import write_manifest
from megatrain.data_prep.shards.writer import ShardWriter
from megatrain.errors import InputError
from megatrain.inspect import run
from tests.checkpoint.layouts import even_layout, random_whole, trainer_state
from tests.data.http_server import serve

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (50, 20), "head": (20, 50)}


def save(run_dir: Path, step: int) -> Path:
    shards = even_layout(SHAPES, 1).shards(0, random_whole(SHAPES))
    return CheckpointManager(run_dir).save(step, shards, trainer_state(step))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_whole_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(InspectConfig(path=str(save(tmp_path, 100)))) == 0
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["step", "100"] in lines
    assert ["parameters", "2,000 in 2"] in lines
    assert ["exp_avg float32", "2,000 elements"] in lines
    assert ["whole", "yes"] in lines


def test_an_altered_step_names_the_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, 100)
    flip(folder / "rank_00000.bin", 7)
    assert run(InspectConfig(path=str(folder))) == 1
    assert f"not whole: {folder}/rank_00000.bin: chunk 0 (of 65536 bytes) is altered" in capsys.readouterr().out


def test_a_run_directory_shows_all_and_what_was_never_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (step_folder(tmp_path, 30) / "commit.json").unlink()
    assert run(InspectConfig(path=str(tmp_path))) == 0
    out = capsys.readouterr().out
    assert f"{step_folder(tmp_path, 30)}: uncommitted (it has no commit.json); nothing reads it" in out
    assert out.count("yes") == 2
    flip(step_folder(tmp_path, 10) / "commit.json", 30)
    assert run(InspectConfig(path=str(tmp_path))) == 1
    assert f"not whole: {step_folder(tmp_path, 10)}/commit.json: altered" in capsys.readouterr().out


def test_an_uncommitted_step_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, 10)
    (folder / "commit.json").unlink()
    assert run(InspectConfig(path=str(folder))) == 1
    assert "uncommitted" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds no committed checkpoint"):
        run(InspectConfig(path=str(tmp_path)))


def write_split(folder: Path, split: str) -> None:
    """Two shards of one member, with their metadata, as prep writes them."""
    (folder / split).mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(b"{}")
    entries = []
    for number in range(2):
        tar = folder / split / shard_name(number)
        pq.write_table(pa.table({"id": ["a", "b"]}), metadata_path(tar))
        writer = ShardWriter(tar)
        writer.add(np.arange(1000, dtype="<u2"), np.array([400, 600], "<u4"))
        entries.append(writer.commit("pages", "en", xxhash.xxh3_128_hexdigest(metadata_path(tar).read_bytes())))
    sha256 = hashlib.sha256(b"{}").hexdigest()
    write_manifest(folder / split, Manifest(split, "uint16", 1000, 0, sha256, 2000, 4, ShardList.of(entries)))


def test_a_whole_set_shows_its_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, TRAIN)
    write_split(tmp_path, HELD_OUT)
    assert run(InspectConfig(path=str(tmp_path))) == 0
    out = capsys.readouterr().out
    assert out.count("2,000 of uint16") == 2
    assert out.count("yes") == 2
    assert run(InspectConfig(path=str(tmp_path / HELD_OUT))) == 0


@pytest.mark.parametrize(
    ("packing", "samples"),
    # In each of two shards 1,000 ids are 999 targets of three windows, and 400, 451 and 150 ids 998 of three samples.
    [(None, "concat │ 6, 26.00% of"), (Packing.best_fit, "best_fit │ 6, 26.07% of")],
)
def test_the_padding_of_a_set_is_shown(
    tmp_path: Path, packing: Packing | None, samples: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path, TRAIN)
    assert run(InspectConfig(path=str(tmp_path), sequence_length=450, packing=packing)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "samples of 450" in line]
    assert len(lines) == 1
    assert samples in lines[0], lines


@pytest.mark.parametrize("suffix", ["tar", "json", "parquet"])
def test_an_altered_file_of_a_set_is_named(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, TRAIN)
    altered = tmp_path / TRAIN / f"shard-000001.{suffix}"
    flip(altered, 100)
    assert run(InspectConfig(path=str(tmp_path))) == 1
    assert f"not whole: {altered}: altered" in capsys.readouterr().out


def test_a_set_at_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the cache is
    write_split(tmp_path / "set", TRAIN)
    write_split(tmp_path / "set", HELD_OUT)
    with serve(tmp_path) as server:
        url = f"{server.url}/set"
        assert run(InspectConfig(path=url, sequence_length=450)) == 0
        assert run(InspectConfig(path=f"{url}/{HELD_OUT}")) == 0
        flip(tmp_path / "set" / HELD_OUT / "shard-000001.parquet", 100)
        assert run(InspectConfig(path=url)) == 1
        with pytest.raises(InputError, match=r"^path=.*: give a shard set, a run directory or the folder of a step$"):
            run(InspectConfig(path=server.url))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("http")] == [
        f"{url}/{TRAIN}",
        f"{url}/{HELD_OUT}",
        f"{url}/{HELD_OUT}",
        f"{url}/{TRAIN}",
        f"{url}/{HELD_OUT}",
    ]
    assert out.count("samples of 450, concat") == 2
    assert f"not whole: {url}/{HELD_OUT}/shard-000001.parquet: altered" in out


def test_tables_go_where_they_are_told(tmp_path: Path) -> None:
    write_split(tmp_path / "set", TRAIN)
    tables = tmp_path / "tables"
    tables.mkdir()
    asked = InspectConfig(path=str(tmp_path / "set"), sequence_length=450, packing=Packing.best_fit)
    asked.index_path = str(tables)
    assert run(asked) == 0
    assert [path.name.split("-")[:2] for path in tables.iterdir()] == [["best_fit", "450"]]
    assert not list((tmp_path / "set" / TRAIN).glob("*.index"))


def test_a_set_that_lacks_a_file_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, TRAIN)
    shutil.copytree(tmp_path, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / TRAIN / "shard-000000.tar", 512)
    (tmp_path / TRAIN / "shard-000000.parquet").unlink()
    for folder in (tmp_path, tmp_path / "copy"):
        assert run(InspectConfig(path=str(folder))) == 1
    out = capsys.readouterr().out
    assert "shard-000000.parquet" in out
    assert "shard-000000.tar: has 512 bytes" in out


def test_neither_checkpoint_nor_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^path=.*: give a shard set, a run directory or the folder of a step$"):
        run(InspectConfig(path=str(tmp_path)))
