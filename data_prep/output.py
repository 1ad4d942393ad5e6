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

from megatrain.data.format import MANIFEST, TRAIN
from megatrain.data_prep.plan import WORK
from megatrain.data_prep.shards.manifest import LINEAGE
from megatrain.data_prep.units import SPLITS
from megatrain.errors import bad_value

BEFORE = "before"
"""What of the work folder has the manifests that a run began with."""


def check_output(output: Path, append: bool) -> None:
    """Refuses a folder that holds a finished set, or anything that an unfinished run of ours didn't leave."""
    if append and not is_finished(output):
        raise bad_value("append", append, f"output={output} holds no finished set to append to")
    if not output.exists() or (output / WORK).is_dir() or append:
        return
    if not output.is_dir():
        raise bad_value("output", output, "a file; give a new folder")
    if is_finished(output):
        _sweep(output)
        raise bad_value("output", output, "already holds a finished set; give another folder, or append=true")
    if any(output.iterdir()):
        raise bad_value("output", output, "holds other files; give a new or empty folder")


def is_finished(output: Path) -> bool:
    """Whether the set is committed: the train split's manifest is written last."""
    return (output / TRAIN / MANIFEST).is_file()


def set_before(output: Path, append: bool) -> Path:
    """Where the manifests and the lineage lie that a run begins with: none, or those of the set that it adds to."""
    kept = output / WORK / BEFORE
    return kept if kept.is_dir() or not append else output


def keep_before(output: Path, append: bool) -> None:
    """Keeps what set_before says until the run is over: a run that dies while it replaces manifests begins with them
    again."""
    kept = output / WORK / BEFORE
    if kept.is_dir():
        return
    new = kept.with_name(f".{BEFORE}.partial")
    new.mkdir()
    names = [LINEAGE, *(f"{split}/{MANIFEST}" for split in SPLITS)] if append else []
    for name in names:
        if (output / name).is_file():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(output / name, new / name)
    new.rename(kept)


def _sweep(output: Path) -> None:
    """Removes what processes that were killed had begun."""
    for left in output.rglob(".*.partial"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def claimed(output: Path, append: bool) -> Iterator[None]:
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
        _sweep(output)
        keep_before(output, append)
        yield
        _sweep(output)
