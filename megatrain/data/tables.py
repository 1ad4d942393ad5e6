"""Tables of a set: arrays in one file that is made once and then mapped by whoever needs it. No torch.

    columns, each from a multiple of 64 bytes on; a JSON object that describes them; its bytes, as uint64

Design choices:
- What is kept can be made again from the set, so a file that is damaged or isn't there is no error: it is made.
- A file's name has the manifest's hash: the table of other data is another file.
- Files are mapped, never loaded: the ranks of a node share one copy, and it is the page cache's to keep or drop.
- Columns are hashed as they are read from the file, not through the map, so to verify a large one costs no memory.
  A column that is too large for that has hashes of its parts in another one, for its owner to check.
- Processes that want the same file at once wait for one to make it, where the file system has locks. Where it has
  none, each makes it: the bytes are the same, and the last rename wins.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data.format import ShardSet
from megatrain.data_prep.execute.pool import in_order
from megatrain.data_prep.execute.tasks import WorkerDiedError
from megatrain.errors import GaveUp, bad_value
from megatrain.resilience.files import sync_folder, temporary_beside

Array = npt.NDArray[Any]
Column = tuple[str, npt.DTypeLike, Iterable[Array]]
"""Name, dtype (little-endian) and the parts of a column of one dimension."""
Key = dict[str, str | int]
"""What a table is a function of."""

Task = TypeVar("Task")
Result = TypeVar("Result")

VERSION = 1
"""Of what is in the columns, and how it was made: another version makes the files anew."""
ALIGNMENT = 64
READ_BYTES = 1 << 20


def set_table(
    shards: ShardSet,
    index_path: str | None,
    name: str,
    make: Callable[[], Iterable[Column]],
    unverified: Collection[str] = (),
) -> dict[str, Array]:
    """The columns of a set's table, read-only; the file is made first if it isn't there whole.

    index_path: data.index_path. name: says what besides the set the table is a function of. unverified: columns whose
    hash isn't checked here. Raises InputError if the file can't be written.
    """
    folder = shards.folder if index_path is None else Path(index_path)
    path = folder / f"{name}-{shards.manifest.sha256[:16]}.index"
    key: Key = {"version": VERSION, "name": name, "manifest_sha256": shards.manifest.sha256}
    found = open_table(path, key, unverified)
    if found is None:
        try:
            with _alone(path):
                if open_table(path, key, unverified) is None:
                    write_table(path, key, make())
        except OSError as error:
            why = f"{path.name} can't be written there ({error.strerror or error}); give a folder where it can"
            raise bad_value("data.index_path", folder, why) from None
        found = open_table(path, key, unverified)
    if found is None:
        raise GaveUp(f"{path}: isn't there any more, or not as it was just written")
    return found


def in_memory(columns: Iterable[Column]) -> dict[str, Array]:
    """The columns of a table that isn't worth a file."""
    return {name: np.concatenate([np.asarray(part, dtype) for part in parts]) for name, dtype, parts in columns}


def by_processes(function: Callable[[Task], Result], tasks: Sequence[Task], worth: int) -> Iterator[Result]:
    """function(task) of each task, in order, by a process for each core, but `worth` at most.

    worth: how many there is work for. Raises what `function` raises, and GaveUp if a process was killed.
    """
    try:
        yield from in_order(function, tasks, min(len(os.sched_getaffinity(0)), worth))
    except WorkerDiedError:
        raise GaveUp("a process that was making an index of the data was killed, maybe for lack of memory") from None


def open_table(path: Path, key: Key, unverified: Collection[str] = ()) -> dict[str, Array] | None:
    """Maps the columns of a table; None if there is none, or it is damaged or has another key."""
    try:
        with path.open("rb") as file:
            description = _description(file)
            if description["key"] != key:
                return None
            columns = description["columns"]
            for name, column in columns.items():
                if name not in unverified and _digest(file, column) != column["xxh3_128"]:
                    return None
            return {name: _map(path, column) for name, column in columns.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_table(path: Path, key: Key, columns: Iterable[Column]) -> None:
    """Writes a table: whole or not at all. Raises OSError."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            described = {name: _write_column(file, dtype, parts) for name, dtype, parts in columns}
            description = json.dumps({"key": key, "columns": described}, sort_keys=True).encode()
            file.write(description + np.uint64(len(description)).astype("<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write_column(file: BinaryIO, dtype: npt.DTypeLike, parts: Iterable[Array]) -> dict[str, Any]:
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset, digest = file.tell(), xxhash.xxh3_128()
    for part in parts:
        data = np.ascontiguousarray(part, dtype).data
        file.write(data)
        digest.update(data)
    stored = np.dtype(dtype)
    size = (file.tell() - offset) // stored.itemsize
    return {"dtype": stored.str, "offset": offset, "size": size, "xxh3_128": digest.hexdigest()}


def _description(file: BinaryIO) -> Any:
    file.seek(-8, os.SEEK_END)
    size = int.from_bytes(file.read(8), "little")
    file.seek(-8 - size, os.SEEK_END)
    return json.loads(file.read(size))


def _digest(file: BinaryIO, column: Mapping[str, Any]) -> str:
    digest = xxhash.xxh3_128()
    file.seek(column["offset"])
    left = column["size"] * np.dtype(column["dtype"]).itemsize
    while left and (data := file.read(min(left, READ_BYTES))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def _map(path: Path, column: Mapping[str, Any]) -> Array:
    dtype = np.dtype(column["dtype"])
    if column["size"] == 0:  # which can't be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", column["offset"], (column["size"],)))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process makes `path`, if the file system can tell."""
    name = path.with_name(f".{path.name}.lock")
    with name.open("wb") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            name.unlink(missing_ok=True)
