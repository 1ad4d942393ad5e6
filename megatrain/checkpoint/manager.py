"""Saves the checkpoints of a run on all ranks together, and cleans up after a death in mid-save.

Design choices:
- A save has stages, and all ranks agree after each: where one rank fails (a full disk) all raise the same error and
  nothing of the attempt is left.
- A step that is saved again (after a fallback) doesn't touch the old folder until the new one is committed: the old
  one steps aside under another name, and comes back if the new one fails, at once or at the next start.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from megatrain.checkpoint.folders import checkpoints_folder, scan, step_folder
from megatrain.checkpoint.format import COMMIT, TrainerState
from megatrain.checkpoint.writer import commit, write_rank
from megatrain.engines.ranges import Shard
from megatrain.errors import GaveUp, MegatrainError
from megatrain.resilience.files import sync_folder

Agree = Callable[[str | None], str | None]
"""Every rank calls it with what failed, or None; every rank gets the same answer: a failure of any rank, or None."""


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
        self._on_rank_0("cleaning checkpoints", lambda: done.extend(_clean(self.run_dir)))
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
        bug = own is not None and not isinstance(own, OSError | MegatrainError)
        failure = self.agree(None if own is None else f"rank {self.rank}: {repr(own) if bug else own}")
        if failure is None:
            return
        if self.rank == 0:
            undo()
        # No rank goes on before the space is free again: writing down what happened needs some.
        self.agree(None)
        if own is not None and bug:
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
        if folder.exists() and not (folder / COMMIT).exists():
            shutil.rmtree(folder)
        if _aside(folder).exists():
            _aside(folder).rename(folder)
            sync_folder(folder.parent)


def _clean(run_dir: Path) -> list[str]:
    done = []
    for found in scan(run_dir):
        if not (found.path / COMMIT).exists():
            shutil.rmtree(found.path)
            done.append(f"{found.path}: uncommitted, removed")
    for aside in checkpoints_folder(run_dir).glob("step_*.replaced"):
        folder = aside.with_suffix("")
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
            sync_folder(folder.parent)
            done.append(f"{folder}: its replacement was never committed, put back")
    return done
