"""The folder that a run of `megatrain prep` writes: whether it may be had, and holding it.

Design choices:
- DIR/.work exists from the start until the set is committed: it tells a run that didn't finish, which may go on, from
  files of other people.
- A lock keeps two runs from writing one set, where the file system has locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatrain.data_prep.plan import WORK
from megatrain.data_prep.shards.manifest import read_manifests
from megatrain.data_prep.units import SPLITS
from megatrain.errors import bad_value


def check_output(output: Path, append: bool) -> None:
    """Refuses a folder that holds a finished set, or anything that an unfinished run of ours didn't leave."""
    finished = output.is_dir() and bool(read_manifests(output))
    if append and not finished:
        raise bad_value("append", append, f"output={output} holds no finished set to append to")
    if not output.exists() or append:
        return
    if not output.is_dir():
        raise bad_value("output", output, "a file; give a new folder")
    if finished:
        raise bad_value("output", output, "already holds a finished set; give another folder, or append=true")
    if not (output / WORK).is_dir() and any(output.iterdir()):
        raise bad_value("output", output, "holds other files; give a new or empty folder")


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Makes the output folder, and holds it against other runs. Raises InputError where it can't be had."""
    try:
        for folder in (WORK, *SPLITS):
            (output / folder).mkdir(parents=True, exist_ok=True)
        lock = (output / WORK / "lock").open("w")
    except OSError as error:
        raise bad_value("output", output, f"can't be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise bad_value("output", output, "another run is writing it") from None
        except OSError:
            pass  # a file system without locks
        for left in output.rglob(".*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
