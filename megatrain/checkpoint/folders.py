"""Which checkpoints there are, in a run directory and in its copy in an object store, and what `checkpoint=` means.

Design choices:
- Plain functions of a path, for the launcher's checks, evaluation and export as for training. No torch.
- Whole means here: committed, and every file there with its size. Bytes are verified by who reads them (reader.py).
- A folder is looked into when its `problem` is asked for: to find the newest, no more than that are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from megatrain import storage
from megatrain.checkpoint.format import COMMIT, BrokenCheckpoint, TrainerState, committed_state, read_commit
from megatrain.errors import bad_value
from megatrain.storage import Folder, listing

if TYPE_CHECKING:
    from upath import UPath

log = logging.getLogger(__name__)
F = TypeVar("F", Path, "UPath")

CHECKPOINTS = "checkpoints"
"""Where a run directory has its checkpoints."""
LEGAL = f"give a run directory or the folder of a step in its {CHECKPOINTS}/"


@dataclass(frozen=True)
class Found(Generic[F]):
    """A step's folder."""

    path: F
    step: int

    @cached_property
    def problem(self) -> str | None:
        """Why it isn't whole, as far as its commit record and file sizes tell; None: it is. Raises OSError."""
        return problem_of(self.path)


def checkpoints_folder(run_dir: F) -> F:
    """Where a run directory, or its copy, has its checkpoints."""
    return run_dir / CHECKPOINTS


def step_folder(run_dir: F, step: int) -> F:
    """The folder of one step."""
    return checkpoints_folder(run_dir) / f"step_{step:08d}"


def problem_of(folder: Folder) -> str | None:
    """Why the step's folder isn't whole, without reading its data; None: it is. Raises OSError."""
    try:
        read_commit(folder)
    except BrokenCheckpoint as error:
        return str(error)
    return None


def scan(run_dir: F) -> list[Found[F]]:
    """The steps' folders of a run directory or of its copy, newest first, whole or not. Raises OSError."""
    folder = checkpoints_folder(run_dir)
    found = []
    for name, size in listing(folder).items():
        match = re.fullmatch(r"step_(\d{8,})", name)
        if match and size is None:
            found.append(Found(folder / name, int(match[1])))
    return sorted(found, key=lambda one: -one.step)


def every(run_dir: Path, remote: str | None) -> list[Found[Path] | Found[UPath]]:
    """Those of a run directory and of its copy at `remote`, newest first; of one step the local one first.

    Raises InputError where `remote` is no URL, OSError where it can't be read.
    """
    copies = scan(storage.root(remote, "saving.remote")) if remote is not None else []
    return sorted([*scan(run_dir), *copies], key=lambda one: -one.step)


def newest(run_dir: Path, remote: str | None = None) -> tuple[Folder | None, list[str]]:
    """The newest whole one of `every` (None: there is none), and why newer ones were passed over."""
    passed_over: list[str] = []
    for one in every(run_dir, remote):
        if one.problem is None:
            return one.path, passed_over
        passed_over.append(one.problem)
    return None, passed_over


def read_state(folder: Folder) -> TrainerState:
    """The trainer's state in a step's folder. Raises BrokenCheckpoint where the folder isn't whole."""
    return committed_state(folder, read_commit(folder))


def resolve(path: str | Path, key: str = "checkpoint") -> Folder:
    """The step's folder that `checkpoint=path` means: the first of `meant`."""
    return next(meant(path, key))


def meant(path: str | Path, key: str = "checkpoint") -> Iterator[Folder]:
    """The folders that `checkpoint=path` may mean: a run directory's whole ones, newest first, or the folder of a step.

    path: a folder or its URL. There is at least one. Raises InputError, naming `key`, where there is none, StorageError
    where its store can't be read.
    """
    if storage.URL.match(str(path)):
        return _meant(storage.root(str(path), key), path, key)
    return _meant(Path(path), path, key)


def _meant(folder: F, path: str | Path, key: str) -> Iterator[Folder]:
    held = listing(folder)
    if not held and not (isinstance(folder, Path) and folder.is_dir()):
        raise bad_value(key, path, f"no such folder; {LEGAL}")
    if CHECKPOINTS in held:
        none = True
        for found in scan(folder):
            if found.problem is None:
                none = False
                yield found.path
            else:
                log.warning("passed over: %s", found.problem)
        if none:
            raise bad_value(key, path, f"the run directory holds no whole checkpoint; {LEGAL}")
        return
    if COMMIT not in held:
        raise bad_value(key, path, f"holds no checkpoint; {LEGAL}")
    problem = problem_of(folder)
    if problem is not None:
        raise bad_value(key, path, f"{problem}; {LEGAL}")
    yield folder
