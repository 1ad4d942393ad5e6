"""The format: what goes in comes out in any other cut, and nothing altered is ever read."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.checkpoint.folders import read_state
from megatrain.checkpoint.format import CHUNK_BYTES, BrokenCheckpoint
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.writer import commit, write_rank
from megatrain.engines.ranges import MASTER, Shard, load
from megatrain.errors import GaveUp
from tests.checkpoint.layouts import (
    STATES,
    Layout,
    Part,
    Whole,
    even_layout,
    layouts,
    random_whole,
    trainer_state,
    write,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (131, 300),
    "norm.weight": (300,),
    "scale": (),
    "odd": (7, 3),
    "gate_up.weight": (64, 300),
}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def assert_holds(reader: CheckpointReader, whole: Whole) -> None:
    for name, states in whole.items():
        for state, value in states.items():
            assert same_bits(reader.read(state, name, 0, value.numel()), value), (state, name)


@settings(max_examples=25, deadline=None)
@given(layout=layouts(SHAPES), dtype=DTYPES, data=st.data())
def test_any_range_of_any_layout_reads_back(layout: Layout, dtype: torch.dtype, data: st.DataObject) -> None:
    whole = random_whole(SHAPES, dtype)
    with TemporaryDirectory() as folder:
        write(Path(folder) / "c", layout, whole)
        reader = CheckpointReader(Path(folder) / "c")
        assert reader.shapes == SHAPES
        for name, shape in SHAPES.items():
            stop = data.draw(st.integers(0, math.prod(shape)))
            start = data.draw(st.integers(0, stop))
            for state in STATES:
                assert same_bits(reader.read(state, name, start, stop), whole[name][state].flatten()[start:stop])


@settings(max_examples=15, deadline=None)
@given(before=layouts(SHAPES), after=layouts(SHAPES), dtype=DTYPES)
def test_a_layout_loads_into_another_bit_for_bit(before: Layout, after: Layout, dtype: torch.dtype) -> None:
    whole = random_whole(SHAPES, dtype)
    empty = {name: {s: torch.zeros_like(v) for s, v in states.items()} for name, states in whole.items()}
    with TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        write(first, before, whole)
        reader = CheckpointReader(first)
        second.mkdir()
        for rank in range(after.world_size):
            shards = after.shards(rank, empty)
            for shard in shards:
                load(shard, reader)
            write_rank(second, rank, shards)
        commit(second, 100, after.world_size, trainer_state(100))
        assert_holds(CheckpointReader(second), whole)


def test_replicas_divide_the_bytes(tmp_path: Path) -> None:
    whole = random_whole({"w": (1000,)})
    layout = Layout(3, (Part("w", ((0, 1000),), (0, 1, 2)),))
    write(tmp_path / "c", layout, whole)
    sizes = [(tmp_path / "c" / f"rank_{rank:05d}.bin").stat().st_size for rank in range(3)]
    assert sizes == [333 * 12, 333 * 12, 334 * 12]


def test_the_trainer_state_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "c", even_layout(SHAPES, 2), random_whole(SHAPES), step=7)
    reader = CheckpointReader(tmp_path / "c")
    assert reader.state == read_state(tmp_path / "c") == {"version": 1, **trainer_state(7)}
    assert (reader.optimizer_step, reader.commit["step"], reader.commit["world_size"]) == (6, 7, 2)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((((0, 40),), ((50, 100),)), "master of w: no rank holds 40 to 50 of 100"),
        ((((0, 60),), ((50, 100),)), "master of w: 50 to 100 of 100 is held twice"),
        ((((0, 50),), ((50, 90),)), "master of w: no rank holds 90 to 100 of 100"),
        ((((10, 50),), ((50, 100),)), "master of w: no rank holds 0 to 10 of 100"),
        ((((0, 100),), ((0, 100),)), "master of w: 0 to 100 of 100 is held twice"),
    ],
)
def test_inexact_coverage_is_not_committed(
    tmp_path: Path, ranges: tuple[tuple[tuple[int, int], ...], ...], message: str
) -> None:
    layout = Layout(2, tuple(Part("w", part, (rank,)) for rank, part in enumerate(ranges)))
    with pytest.raises(BrokenCheckpoint, match=message):
        write(tmp_path / "c", layout, random_whole({"w": (10, 10)}))
    with pytest.raises(BrokenCheckpoint, match="uncommitted"):
        CheckpointReader(tmp_path / "c")


def test_ranks_that_disagree_are_not_committed(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for rank, dtype in enumerate((torch.float32, torch.bfloat16)):
        half = (rank * 5, rank * 5 + 5)
        write_rank(tmp_path / "c", rank, [Shard("w", (10,), (half,), {MASTER: torch.ones(5, dtype=dtype)})])
    with pytest.raises(BrokenCheckpoint, match="master of w: ranks disagree about its shape or dtype"):
        commit(tmp_path / "c", 1, 2, trainer_state(1))


def test_a_rank_that_wrote_nothing_is_not_committed(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_rank(tmp_path / "c", 0, even_layout(SHAPES, 1).shards(0, random_whole(SHAPES)))
    with pytest.raises(BrokenCheckpoint, match=r"rank_00001\.\w+: missing"):
        commit(tmp_path / "c", 1, 2, trainer_state(1))


def test_padding_in_a_view_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exp_avg of w: float32\[12\] for 10 elements"):
        write_rank(tmp_path, 0, [Shard("w", (10,), ((0, 10),), {"exp_avg": torch.zeros(12)})])


def read_everything(folder: Path) -> None:
    CheckpointReader(folder).verify_all()


def test_every_flipped_byte_is_detected(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shapes: dict[str, tuple[int, ...]] = {"w": (3, 5), "large": (CHUNK_BYTES // 8 + 11,)}
    write(folder, even_layout(shapes, 2), random_whole(shapes))
    read_everything(folder)
    chosen = random.Random(0)
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        places = range(len(raw)) if len(raw) <= 100 else sorted(chosen.sample(range(len(raw)), 60))
        for place in {0, len(raw) - 1, *places}:
            altered = bytearray(raw)
            altered[place] ^= 1 << chosen.randrange(8)
            path.write_bytes(altered)
            with pytest.raises(BrokenCheckpoint, match=path.name):
                read_everything(folder)
        path.write_bytes(raw)
    read_everything(folder)


def test_every_truncated_extended_or_missing_file_is_detected(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write(folder, even_layout(SHAPES, 2), random_whole(SHAPES))
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        for content in (raw[:-1], raw[: len(raw) // 2], b"", raw + b"\0"):
            path.write_bytes(content)
            with pytest.raises(BrokenCheckpoint):
                CheckpointReader(folder)
        path.unlink()
        with pytest.raises(BrokenCheckpoint):
            CheckpointReader(folder)
        path.write_bytes(raw)
    read_everything(folder)


def test_a_read_touches_and_verifies_only_the_chunks_it_needs(tmp_path: Path) -> None:
    folder, chunk = tmp_path / "c", CHUNK_BYTES // 4
    whole = random_whole({"w": (40 * chunk,)})
    write(folder, even_layout({"w": (40 * chunk,)}, 1), whole)
    data = folder / "rank_00000.bin"
    altered = bytearray(data.read_bytes())
    altered[30 * CHUNK_BYTES + 17] ^= 4
    data.write_bytes(altered)
    reader = CheckpointReader(folder)
    assert reader.bytes_read == 0
    assert same_bits(
        reader.read(MASTER, "w", chunk + 5, 20 * chunk + 5), whole["w"][MASTER][chunk + 5 : 20 * chunk + 5]
    )
    assert reader.bytes_read == 20 * CHUNK_BYTES
    assert len(reader.read(MASTER, "w", 31 * chunk, 40 * chunk)) == 9 * chunk
    with pytest.raises(BrokenCheckpoint, match=r"rank_00000\.bin: chunk 30 \(of 65536 bytes\) is altered"):
        reader.read(MASTER, "w", 31 * chunk - 1, 31 * chunk)


def test_a_chunk_that_is_read_again_is_verified_again(tmp_path: Path) -> None:
    write(tmp_path / "c", even_layout({"w": (10,)}, 1), random_whole({"w": (10,)}))
    reader = CheckpointReader(tmp_path / "c")
    reader.verify_all()
    data = tmp_path / "c" / "rank_00000.bin"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    with pytest.raises(BrokenCheckpoint, match=r"rank_00000\.bin: chunk 0 \(of 65536 bytes\) is altered"):
        reader.read(MASTER, "w", 5, 6)


def test_what_it_does_not_hold_is_one_clear_line(tmp_path: Path) -> None:
    write(tmp_path / "c", even_layout({"w": (10,)}, 1), random_whole({"w": (10,)}))
    reader = CheckpointReader(tmp_path / "c")
    with pytest.raises(GaveUp, match="holds no momentum of w"):
        reader.read("momentum", "w", 0, 1)
    with pytest.raises(GaveUp, match="w has 10 elements; 5 to 11 were asked for"):
        reader.read(MASTER, "w", 5, 11)


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write(folder, even_layout({"w": (10,)}, 1), random_whole({"w": (10,)}))
    record = json.loads((folder / "commit.json").read_bytes()) | {"version": 2}
    del record["xxh3_128"]
    sealed = record | {"xxh3_128": xxhash.xxh3_128_hexdigest(canonical(record))}
    (folder / "commit.json").write_bytes(canonical(sealed))
    with pytest.raises(BrokenCheckpoint, match="of version 2; this program reads 1"):
        CheckpointReader(folder)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_another_program_reads_it_from_the_document_alone(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    whole = random_whole(SHAPES)
    write(folder, even_layout(SHAPES, 3), whole)
    shutil.copytree(folder, tmp_path / "copy")
    folder = tmp_path / "copy"

    record = json.loads((folder / "commit.json").read_bytes())
    digest = record.pop("xxh3_128")
    assert xxhash.xxh3_128_hexdigest(canonical(record)) == digest
    raw = (folder / "index.json").read_bytes()
    assert xxhash.xxh3_128_hexdigest(raw) == record["files"]["index.json"]["xxh3_128"]
    index = json.loads(raw)
    files = []
    for rank in range(record["world_size"]):
        data, hashes = ((folder / f"rank_{rank:05d}.{suffix}").read_bytes() for suffix in ("bin", "xxh3"))
        assert xxhash.xxh3_128_hexdigest(hashes) == index["hashes"][rank]
        chunks = [data[start : start + 65536] for start in range(0, len(data), 65536)]
        assert hashes == b"".join(map(xxhash.xxh3_128_digest, chunks))
        files.append(data)
    found = {}
    for parameter in index["parameters"]:
        assert parameter["shape"] == list(SHAPES[parameter["name"]])
        for state, ranges in parameter["states"].items():
            parts, start = [], 0
            for rank, stop, offset in zip(ranges["rank"], ranges["stop"], ranges["offset"], strict=True):
                parts.append(np.frombuffer(files[rank], "<u4", stop - start, offset))
                start = stop
            found[state, parameter["name"]] = np.concatenate(parts)
    assert set(found) == {(state, name) for name in SHAPES for state in STATES}
    for (state, name), values in found.items():
        assert values.tobytes() == whole[name][state].flatten().view(torch.uint8).numpy().tobytes()
