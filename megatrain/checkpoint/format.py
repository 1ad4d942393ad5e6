"""Version 1 of the checkpoint format (docs/checkpoint.md): its names and records, and the reader.

Design choices:
- Raw little-endian bytes and JSON: any program can read them, none can be made to run something (law 8).
- A chain of hashes hangs on commit.json: it holds the hash of itself, of state.json and of each rank's index; an index
  holds the hash of the rank's table of chunk hashes; the table holds one for each 64 KiB of data. So a reader verifies
  what it touches and no more, and every byte of the folder is covered.
- Chunk hashes are a file of their own, not part of the index: all readers need all indexes, but hashes only of the
  files they read from (0.8 TB of state have 200 MB of hashes).
- File names follow from the world size; a name in a JSON file is never opened.
- A data file is opened for each contiguous read: a thousand ranks' files don't use up the process's descriptors.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from megatrain.errors import GaveUp

VERSION = 1
CHUNK_BYTES = 64 * 1024
"""Bytes of a data file that have one hash."""
DIGEST_BYTES = 16
CALL_BYTES = 1024 * 1024
"""Bytes of one read or write: 4 MB calls into new files were measured 2x slower."""
COMMIT = "commit.json"
STATE = "state.json"
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}
"""Element types by the name they have in an index."""


class BrokenCheckpoint(GaveUp):
    """A checkpoint that is not whole: uncommitted, incomplete or altered."""


class TrainerState(TypedDict):
    """What a run needs besides tensors to go on; the content of state.json next to its `version`."""

    step: int
    """Steps of the run, skipped ones included."""
    optimizer_step: int
    """Steps the optimizer has taken: what AdamW's bias correction counts."""
    samples: int
    """Samples consumed: n of law 2."""
    data: dict[str, Any]
    """The loader's state: n, segments, fingerprint."""
    config: dict[str, Any]
    """The resolved configuration, without secrets."""
    tokenizer: dict[str, Any]
    """What is known of the tokenizer: sha256 of its file, eos_id, ..."""
    wandb_run_id: str | None
    rng: NotRequired[dict[str, Any]]
    """States of random number generators, where any are used."""


class FileRecord(TypedDict):
    """A file of a checkpoint, in its commit record."""

    bytes: int
    xxh3_128: NotRequired[str]
    """Not there for data files and tables of chunk hashes, whose hashes hang on the index."""


class Commit(TypedDict):
    """The commit record."""

    version: int
    step: int
    world_size: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Row:
    """A range of one state of one parameter, as a data file holds it.

    rank: whose data file. shape: of the whole parameter. start, stop: elements of the flattened parameter.
    offset: bytes into the data file.
    """

    rank: int
    state: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    offset: int


def data_name(rank: int) -> str:
    """The file of a rank's bytes."""
    return f"rank_{rank:05d}.bin"


def hashes_name(rank: int) -> str:
    """The file of their chunk hashes: 16 bytes each (xxh3-128, big-endian), in order."""
    return f"rank_{rank:05d}.xxh3"


def index_name(rank: int) -> str:
    """The file that says what they are."""
    return f"rank_{rank:05d}.json"


def file_names(world_size: int) -> set[str]:
    """All files of a checkpoint but its commit record."""
    ranks = range(world_size)
    return {STATE, *map(data_name, ranks), *map(hashes_name, ranks), *map(index_name, ranks)}


def encode(value: Any) -> bytes:
    """JSON in its canonical form: keys sorted, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal(commit: Commit) -> bytes:
    """The bytes of commit.json: canonical, with the hash of the canonical form of all the rest."""
    return encode({**commit, "xxh3_128": xxhash.xxh3_128_hexdigest(encode(commit))})


def read_commit(folder: Path) -> Commit:
    """The commit record of `folder`, and its files checked for presence and size (not for their bytes).

    Raises BrokenCheckpoint: there is none, it is altered, of another version, or a file is missing or of another size.
    """
    try:
        raw = (folder / COMMIT).read_bytes()
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{folder}: uncommitted (it has no {COMMIT})") from None
    try:
        commit: Commit = json.loads(raw)
        del commit["xxh3_128"]  # type: ignore[typeddict-item]
        whole = seal(commit) == raw
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise BrokenCheckpoint(f"{folder / COMMIT}: altered")
    if commit["version"] != VERSION:
        raise BrokenCheckpoint(f"{folder}: of version {commit['version']}; this program reads {VERSION}")
    if set(commit["files"]) != file_names(commit["world_size"]):
        raise BrokenCheckpoint(f"{folder / COMMIT}: doesn't list the files of {commit['world_size']} ranks")
    for name, record in commit["files"].items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{path}: missing")
        if (size := path.stat().st_size) != record["bytes"]:
            raise BrokenCheckpoint(f"{path}: {size} bytes, {record['bytes']} were written")
    return commit


def check_coverage(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (state, name), ascending; they are exactly the whole parameter.

    Raises BrokenCheckpoint: a gap, an overlap, or rows that disagree about shape or dtype.
    """
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.state, row.name), []).append(row)
    for (state, name), group in grouped.items():
        group.sort(key=attrgetter("start"))
        if len({(row.shape, row.dtype) for row in group}) > 1:
            raise BrokenCheckpoint(f"{state} of {name}: ranks disagree about its shape or dtype")
        size, end = math.prod(group[0].shape), 0
        for row in group:
            what = f"{state} of {name}: {row.start} to {row.stop} of {size}"
            if not 0 <= row.start < row.stop <= size:
                raise BrokenCheckpoint(f"{what} is no range")
            if row.start < end:
                raise BrokenCheckpoint(f"{what} is held twice")
            if row.start > end:
                raise BrokenCheckpoint(f"{state} of {name}: no rank holds {end} to {row.start} of {size}")
            end = row.stop
        if end < size:
            raise BrokenCheckpoint(f"{state} of {name}: no rank holds {end} to {size} of {size}")
    return grouped


def read_hashed(path: Path, digest: str) -> bytes:
    """The bytes of a file whose xxh3-128 is known. Raises BrokenCheckpoint where it is another."""
    raw = path.read_bytes()
    if xxhash.xxh3_128_hexdigest(raw) != digest:
        raise BrokenCheckpoint(f"{path}: altered")
    return raw


class DataFile:
    """The bytes of one rank, each chunk verified at first touch."""

    def __init__(self, path: Path, size: int, hashes_path: Path, hashes_digest: str) -> None:
        """size: bytes of the file at `path`. hashes_digest: xxh3-128 of the file of chunk hashes, in hexadecimal."""
        self.path = path
        self.size = size
        self._hashes_path = hashes_path
        self._hashes_digest = hashes_digest
        self._hashes: bytes | None = None
        self._verified = bytearray(-(-size // CHUNK_BYTES))
        self.bytes_read = 0

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fills `out` with the bytes from `offset` on; reads the chunks that hold them and no others."""
        end = offset + len(out)
        if end > self.size:
            raise BrokenCheckpoint(f"{self.path}: its index points past its end")
        last = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, self.size)
        buffer = np.empty(CALL_BYTES, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for start in range(offset // CHUNK_BYTES * CHUNK_BYTES, end, CALL_BYTES):
                block = buffer[: min(CALL_BYTES, last - start)]
                self._read_block(file, start, block)
                low, high = max(offset, start), min(end, start + CALL_BYTES)
                out[low - offset : high - offset] = block[low - start : high - start]

    def verify(self) -> None:
        """Reads and verifies the whole file."""
        buffer = np.empty(CALL_BYTES, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.size, CALL_BYTES):
                self._read_block(file, start, buffer[: min(CALL_BYTES, self.size - start)])

    def _read_block(self, file: BinaryIO, start: int, block: NDArray[np.uint8]) -> None:
        """Fills `block` with whole chunks from byte `start` on, which is a multiple of the chunk's size."""
        if self._hashes is None:
            self._hashes = read_hashed(self._hashes_path, self._hashes_digest)
        file.seek(start)
        view = block.data
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise BrokenCheckpoint(f"{self.path}: ends before its {self.size} bytes")
            view = view[count:]
        self.bytes_read += len(block)
        for position in range(0, len(block), CHUNK_BYTES):
            number = (start + position) // CHUNK_BYTES
            if self._verified[number]:
                continue
            expected = self._hashes[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if xxhash.xxh3_128_digest(block.data[position : position + CHUNK_BYTES]) != expected:
                raise BrokenCheckpoint(f"{self.path}: chunk {number} (of {CHUNK_BYTES} bytes) is altered")
            self._verified[number] = 1


class CheckpointReader:
    """A committed checkpoint, as a ShardReader.

    folder: of one step. state: what the trainer saved. shapes: of every parameter as it is stored.
    Raises BrokenCheckpoint where the folder is not whole; bytes of tensors are verified when they are read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = read_commit(folder)
        self.state: TrainerState = json.loads(self._read_json(STATE))
        self._files: list[DataFile] = []
        rows: list[Row] = []
        for rank in range(self.commit["world_size"]):
            index = json.loads(self._read_json(index_name(rank)))
            rows += [Row(rank, **{**row, "shape": tuple(row["shape"])}) for row in index["rows"]]
            size = self.commit["files"][data_name(rank)]["bytes"]
            self._files.append(DataFile(folder / data_name(rank), size, folder / hashes_name(rank), index["hashes"]))
        self.rows = check_coverage(rows)
        self.shapes = {name: rows[0].shape for (_, name), rows in self.rows.items()}

    @property
    def optimizer_step(self) -> int:
        """Steps that the optimizer has taken."""
        return self.state["optimizer_step"]

    @property
    def bytes_read(self) -> int:
        """Bytes of data files read so far."""
        return sum(file.bytes_read for file in self._files)

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`: 1-D, on the CPU, in the dtype it was stored in.

        Raises BrokenCheckpoint where a chunk is altered, GaveUp where the checkpoint doesn't hold those elements.
        """
        rows = self.rows.get((state, name))
        if rows is None:
            raise GaveUp(f"{self.folder}: holds no {state} of {name}")
        if not 0 <= start <= stop <= rows[-1].stop:
            raise GaveUp(f"{self.folder}: {name} has {rows[-1].stop} elements; {start} to {stop} were asked for")
        tensor = torch.empty(stop - start, dtype=DTYPES[rows[0].dtype])
        raw = tensor.view(torch.uint8).numpy()
        position = start
        number = bisect_right(rows, start, key=attrgetter("start")) - 1
        while position < stop:
            row = rows[number]
            until = min(stop, row.stop)
            part = raw[(position - start) * tensor.itemsize : (until - start) * tensor.itemsize]
            self._files[row.rank].read_into(row.offset + (position - row.start) * tensor.itemsize, part)
            position = until
            number += 1
        return tensor

    def verify_all(self) -> None:
        """Reads and verifies every byte. Raises BrokenCheckpoint at the first chunk that is altered."""
        for file in self._files:
            file.verify()

    def _read_json(self, name: str) -> bytes:
        return read_hashed(self.folder / name, self.commit["files"][name]["xxh3_128"])
