"""Which checkpoints there are: the folders of a run directory, the newest whole one, what `checkpoint=` means.

Design choices:
- Plain functions of a path, for the launcher's checks, evaluation and export as for training. No torch.
- Whole means here: committed, and every file there with its size. Bytes are verified by who reads them (reader.py).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from megatrain.checkpoint.format import COMMIT, BrokenCheckpoint, TrainerState, committed_state, read_commit
from megatrain.errors import bad_value

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A step's folder. problem: why it isn't whole, as far as its commit record and file sizes tell; None: it is."""

    path: Path
    step: int
    problem: str | None


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run directory has its checkpoints."""
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of one step."""
    return checkpoints_folder(run_dir) / f"step_{step:08d}"


def problem_of(folder: Path) -> str | None:
    """Why the step's folder isn't whole, without reading its data; None: it is."""
    try:
        read_commit(folder)
    except BrokenCheckpoint as error:
        return str(error)
    return None


def scan(run_dir: Path) -> list[Found]:
    """The steps' folders of a run directory, newest first, whole or not."""
    found = []
    for path in checkpoints_folder(run_dir).glob("step_*"):
        match = re.fullmatch(r"step_(\d{8,})", path.name)
        if match and path.is_dir():
            found.append(Found(path, int(match[1]), problem_of(path)))
    return sorted(found, key=lambda one: -one.step)


def candidates(run_dir: Path) -> tuple[list[Found], list[str]]:
    """The whole checkpoints of a run directory, newest first, and why others were passed over."""
    found = scan(run_dir)
    return [one for one in found if one.problem is None], [one.problem for one in found if one.problem is not None]


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run directory (None: it has none), and why newer ones were passed over."""
    passed_over: list[str] = []
    for one in scan(run_dir):
        if one.problem is None:
            return one.path, passed_over
        passed_over.append(one.problem)
    return None, passed_over


def read_state(folder: Path) -> TrainerState:
    """The trainer's state in a step's folder. Raises BrokenCheckpoint where the folder isn't whole."""
    return committed_state(folder, read_commit(folder))


def resolve(path: str | Path, key: str = "checkpoint") -> Path:
    """The step's folder that `checkpoint=path` means: a run directory's newest whole one, or the folder itself.

    Raises InputError, naming `key`, where there is none.
    """
    folder = Path(path)
    legal = "give a run directory or the folder of a step in its checkpoints/"
    if not folder.is_dir():
        raise bad_value(key, path, f"no such folder; {legal}")
    if checkpoints_folder(folder).is_dir():
        found, passed_over = newest(folder)
        for reason in passed_over:
            log.warning("passed over: %s", reason)
        if found is None:
            raise bad_value(key, path, f"the run directory holds no whole checkpoint; {legal}")
        return found
    if not (folder / COMMIT).exists():
        raise bad_value(key, path, f"holds no checkpoint; {legal}")
    problem = problem_of(folder)
    if problem is not None:
        raise bad_value(key, path, f"{problem}; {legal}")
    return folder
