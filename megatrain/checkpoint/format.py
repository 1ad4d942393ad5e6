"""Version 1 of the checkpoint format (docs/checkpoint.md): its names, its records, and what makes them whole.

Design choices:
- Raw little-endian bytes and JSON: any program can read them, none can be made to run something (law 8).
- A chain of hashes hangs on commit.json: it holds the hash of itself, of state.json and of the index; the index holds
  the hash of each rank's table of chunk hashes; a table holds one for each 64 KiB of data. So a reader verifies what it
  touches and no more, and every byte of the folder is covered.
- Chunk hashes are files of their own, not part of the index: all readers need all of the index, but hashes only of the
  files they read from (0.8 TB of state have 200 MB of hashes).
- File names follow from the world size; a name in a JSON file is never opened.
- No torch: what may be continued is checked before any rank starts.
"""

from __future__ import annotations

import json
from typing import Any, NotRequired, TypedDict

import xxhash

from megatrain.errors import GaveUp
from megatrain.resilience.anomalies import AnomaliesState
from megatrain.storage import Folder, listing, read_file

VERSION = 1
CHUNK_BYTES = 64 * 1024
"""Bytes of a data file that have one hash."""
DIGEST_BYTES = 16
CALL_BYTES = 1024 * 1024
"""Bytes of one read or write: 4 MB calls into new files were measured 2x slower."""
COMMIT = "commit.json"
INDEX = "index.json"
STATE = "state.json"
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8")
"""Element types, as an index and torch name them."""


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
    held_out_loss: NotRequired[float]
    """Of this step, where it was evaluated."""
    anomalies: NotRequired[AnomaliesState]
    """What is known of the steps before, for those that come."""
    rng: NotRequired[dict[str, Any]]
    """States of random number generators, where any are used."""
    weights_only: NotRequired[bool]
    """It holds masters and no moments: a run can begin with it, not go on from it."""


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


def data_name(rank: int) -> str:
    """The file of a rank's bytes."""
    return f"rank_{rank:05d}.bin"


def hashes_name(rank: int) -> str:
    """The file of their chunk hashes: 16 bytes each (xxh3-128, big-endian), in order."""
    return f"rank_{rank:05d}.xxh3"


def rows_name(rank: int) -> str:
    """The rank's own index, which is part of INDEX once the checkpoint is committed."""
    return f"rank_{rank:05d}.json"


def file_names(world_size: int) -> set[str]:
    """All files of a checkpoint but its commit record."""
    ranks = range(world_size)
    return {STATE, INDEX, *map(data_name, ranks), *map(hashes_name, ranks)}


def encode(value: Any) -> bytes:
    """JSON in its canonical form: keys sorted, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal(commit: Commit) -> bytes:
    """The bytes of commit.json: canonical, with the hash of the canonical form of all the rest."""
    return encode({**commit, "xxh3_128": xxhash.xxh3_128_hexdigest(encode(commit))})


def read_commit(folder: Folder) -> Commit:
    """The commit record of `folder`, and its files checked for presence and size (not for their bytes).

    Raises BrokenCheckpoint: there is none, it is altered, of another version, or a file is missing or of another size.
    """
    sizes = listing(folder)
    size = sizes.get(COMMIT)
    if size is None:
        raise BrokenCheckpoint(f"{folder}: uncommitted (it has no {COMMIT})")
    raw = read_file(folder / COMMIT, size)
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
        size = sizes.get(name)
        if size is None:
            raise BrokenCheckpoint(f"{folder / name}: missing")
        if size != record["bytes"]:
            raise BrokenCheckpoint(f"{folder / name}: {size} bytes, {record['bytes']} were written")
    return commit


def check_hash(path: Folder, raw: bytes, digest: str) -> bytes:
    """`raw`, which was read from `path`. Raises BrokenCheckpoint where its xxh3-128 is another."""
    if xxhash.xxh3_128_hexdigest(raw) != digest:
        raise BrokenCheckpoint(f"{path}: altered")
    return raw


def read_hashed(path: Folder, size: int, digest: str) -> bytes:
    """The bytes of a file whose size and xxh3-128 are known. Raises BrokenCheckpoint where it isn't that."""
    try:
        raw = read_file(path, size)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{path}: missing") from None
    return check_hash(path, raw, digest)


def committed_state(folder: Folder, commit: Commit) -> TrainerState:
    """What the trainer saved. Raises BrokenCheckpoint where state.json isn't what was committed."""
    record = commit["files"][STATE]
    state: TrainerState = json.loads(read_hashed(folder / STATE, record["bytes"], record["xxh3_128"]))
    return state
