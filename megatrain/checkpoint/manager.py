"""Checkpoints of a run: saving one on all ranks together, finding the newest whole one, cleaning up after a death.

Design choices:
- A save has stages, and all ranks agree after each: where one rank fails (a full disk) all raise the same error and
  nothing of the attempt is left.
- A step that is saved again (after a fallback) doesn't touch the old folder until the new one is committed: the old
  one steps aside under another name, and comes back if the new one fails, at once or at the next start.
- Finding and resolving are plain functions of a path, so that evaluation and export need no manager.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatrain.checkpoint.format import COMMIT, BrokenCheckpoint, TrainerState, read_commit
from megatrain.checkpoint.writer import commit, write_rank
from megatrain.engines.ranges import Shard
from megatrain.errors import GaveUp, MegatrainError, bad_value
from megatrain.resilience.files import sync_folder

Agree = Callable[[str | None], str | None]
"""Every rank calls it with what failed, or None; every rank gets the same answer: a failure of any rank, or None."""

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


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run directory (None: it has none), and why newer ones were passed over."""
    passed_over: list[str] = []
    for one in scan(run_dir):
        if one.problem is None:
            return one.path, passed_over
        passed_over.append(one.problem)
    return None, passed_over


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


def alone(failure: str | None) -> str | None:
    """Agreeing in a run of one process."""
    return failure


def _nothing() -> None:
    pass


class CheckpointManager:
    """Writes the checkpoints of a run. Every rank has one and makes the same calls."""

    def __init__(self, run_dir: Path, rank: int = 0, world_size: int = 1, agree: Agree = alone) -> None:
        self.run_dir = run_dir
        self.rank = rank
        self.world_size = world_size
        self.agree = agree

    def clean(self) -> list[str]:
        """Removes what a death in mid-save left; call it before newest(). Rank 0 gets a line for each thing done."""
        done: list[str] = []
        self._on_rank_0("cleaning checkpoints", lambda: done.extend(_clean(checkpoints_folder(self.run_dir))))
        return done

    def save(self, step: int, shards: Iterable[Shard], state: TrainerState) -> Path:
        """Writes and commits the checkpoint of `step`; returns its folder. Nothing may change the shards meanwhile.

        state: rank 0's is written. Raises GaveUp on every rank where one couldn't write; nothing is left of the
        attempt then. A bug on one rank raises as it is there, and GaveUp on the others.
        """
        folder = step_folder(self.run_dir, step)
        doing = f"{folder}: not saved"
        self._on_rank_0(doing, lambda: _make_way(folder), lambda: _step_back(folder))
        self._together(doing, lambda: write_rank(folder, self.rank, shards), lambda: _step_back(folder))
        self._on_rank_0(doing, lambda: commit(folder, step, self.world_size, state), lambda: _step_back(folder))
        if self.rank == 0:
            shutil.rmtree(_aside(folder), ignore_errors=True)
        return folder

    def _on_rank_0(self, doing: str, work: Callable[[], None], undo: Callable[[], None] = _nothing) -> None:
        self._together(doing, work if self.rank == 0 else _nothing, undo)

    def _together(self, doing: str, work: Callable[[], None], undo: Callable[[], None]) -> None:
        """Works on every rank; where one fails, rank 0 undoes and all raise. Returns when all ranks are done."""
        own: Exception | None = None
        try:
            work()
        except Exception as error:
            own = error
        failure = self.agree(None if own is None else f"rank {self.rank}: {own}")
        if failure is None:
            return
        if self.rank == 0:
            undo()
        # No rank goes on before the space is free again: writing down what happened needs some.
        self.agree(None)
        if own is not None and not isinstance(own, OSError | MegatrainError):
            raise own
        raise GaveUp(f"{doing}: {failure}") from own


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def _make_way(folder: Path) -> None:
    """Makes an empty `folder`; a committed one of the same step steps aside until the new one is committed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder / COMMIT).exists():
        shutil.rmtree(_aside(folder), ignore_errors=True)
        folder.rename(_aside(folder))
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    sync_folder(folder.parent)


def _step_back(folder: Path) -> None:
    """Removes a failed attempt and brings back what stepped aside for it; clean() comes for what it can't do now."""
    with suppress(OSError):
        if folder.exists():
            shutil.rmtree(folder)
        if _aside(folder).exists():
            _aside(folder).rename(folder)
            sync_folder(folder.parent)


def _clean(checkpoints: Path) -> list[str]:
    done = []
    for path in sorted(checkpoints.glob("step_*")):
        if path.suffix != ".replaced" and not (path / COMMIT).exists():
            shutil.rmtree(path)
            done.append(f"{path}: uncommitted, removed")
    for path in sorted(checkpoints.glob("step_*.replaced")):
        folder = path.with_suffix("")
        if folder.exists():
            shutil.rmtree(path)
        else:
            path.rename(folder)
            sync_folder(checkpoints)
            done.append(f"{folder}: its replacement was never committed, put back")
    return done
