"""Checkpoints in an object store: what `saving.remote=URL` means, and copying them there.

Design choices:
- What is copied is the folder of a checkpoint that is committed on the file system, under the same names. Each rank
  copies its own files; rank 0 the commit record, last, once every file is there with its size.
- A rank that copies first removes the commit record of an older attempt at the step: no reader sees a mixture.
- Retries are left to the store's library. What fails after them is one OSError, which its caller may try again.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from megatrain.checkpoint.format import COMMIT, INDEX, STATE, data_name, hashes_name, read_commit
from megatrain.errors import bad_value
from megatrain.resilience.files import sync_folder
from megatrain.storage import LEGAL, Folder, StorageError, listing, one_line

if TYPE_CHECKING:
    from upath import UPath

RUN_FILES = ("config.yaml", "tokenizer.json")


def check_writable(remote: UPath, key: str = "saving.remote") -> None:
    """Writes and removes an empty file. Raises InputError naming `key` where the store doesn't let it."""
    probe = remote / f".megatrain_{uuid4().hex}"
    try:
        with one_line(remote):
            probe.fs.pipe_file(probe.path, b"")
            probe.fs.rm_file(probe.path)
    except OSError as error:
        raise bad_value(key, str(remote), f"can't be written ({error}); {LEGAL}") from error


def upload_rank(folder: Path, remote: UPath, rank: int) -> None:
    """Copies the files of `rank` from a committed step's folder to the same place below `remote`. Raises OSError."""
    target = _below(remote, folder)
    _unlink(target / COMMIT)
    for name in (data_name(rank), hashes_name(rank)):
        _put(folder / name, target / name)


def upload_commit(folder: Path, remote: UPath) -> None:
    """Makes the copy a checkpoint. Rank 0 only, when upload_rank has returned on all ranks.

    Raises OSError, also where a file isn't there with its size; BrokenCheckpoint where `folder` isn't whole.
    """
    target = _below(remote, folder)
    commit = read_commit(folder)
    for name in (STATE, INDEX):
        _put(folder / name, target / name)
    sizes = listing(target)
    for name, record in commit["files"].items():
        if sizes.get(name) != record["bytes"]:
            raise StorageError(f"{target / name}: {sizes.get(name, 0)} bytes of {record['bytes']} are there")
    _put(folder / COMMIT, target / COMMIT)


def upload_run(run_dir: Path, remote: UPath) -> None:
    """Copies what a checkpoint can't be used without, where it isn't there yet: the tokenizer and the configuration."""
    there = listing(remote)
    for name in RUN_FILES:
        if (run_dir / name).is_file() and there.get(name) != (run_dir / name).stat().st_size:
            _put(run_dir / name, remote / name)


def remove(folder: Folder) -> None:
    """Removes a step's folder, local or remote, the commit record first: what dies in between leaves no checkpoint.

    Does nothing where there is none. Raises OSError.
    """
    if not isinstance(folder, Path):
        _unlink(folder / COMMIT)
        with suppress(FileNotFoundError), one_line(folder):
            folder.fs.rm(folder.path, recursive=True)
    elif folder.exists():
        (folder / COMMIT).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def _below(remote: UPath, folder: Path) -> UPath:
    """Where the folder RUN_DIR/checkpoints/STEP has its copy."""
    return remote / folder.parent.name / folder.name


def _put(source: Path, target: UPath) -> None:
    with one_line(target):
        target.fs.put_file(str(source), target.path)


def _unlink(path: UPath) -> None:
    with suppress(FileNotFoundError), one_line(path):
        path.fs.rm_file(path.path)
