"""Saves and loads the checkpoints of a run on all ranks together, and cleans up after a death in mid-save.

Design choices:
- A save has stages, and all ranks agree after each: where one rank fails (a full disk) all raise the same error and
  nothing of the attempt is left.
- Engines load with collectives, so no rank may stop in the middle of it: one that meets altered bytes goes on with
  zeros, and when all are done all load the next older checkpoint.
- Where checkpoints were committed but none is whole, the run ends: starting afresh would bury them.
- A step that is saved again (after a fallback) doesn't touch the old folder until the new one is committed: the old
  one steps aside under another name, and comes back if the new one fails, at once or at the next start.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatrain import storage
from megatrain.checkpoint import remote as remotes
from megatrain.checkpoint import retention
from megatrain.checkpoint.folders import F, Found, checkpoints_folder, every, scan, step_folder
from megatrain.checkpoint.format import COMMIT, BrokenCheckpoint, TrainerState
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.writer import commit, write_rank
from megatrain.config import SavingConfig
from megatrain.engines.ranges import Shard, ShardReader
from megatrain.errors import GaveUp, MegatrainError
from megatrain.resilience.files import sync_folder
from megatrain.storage import Folder, listing

if TYPE_CHECKING:
    from upath import UPath

log = logging.getLogger(__name__)

Agree = Callable[[str | None], str | None]
"""Every rank calls it with what it has to say (a failure), or None; all get what was said first, or None."""

_BUG = "bug at "


class NotSaved(GaveUp):
    """A save failed on some rank, on account of the disk or what is on it; nothing of it is left."""


def alone(failure: str | None) -> str | None:
    """Agreeing in a run of one process."""
    return failure


def _nothing() -> None:
    pass


class CheckpointManager:
    """Writes the checkpoints of a run. Every rank has one and makes the same calls."""

    def __init__(
        self, run_dir: Path, rank: int = 0, world_size: int = 1, agree: Agree = alone, remote: str | None = None
    ) -> None:
        """remote: the URL of the run directory's copy, if there is to be one."""
        self.run_dir = run_dir
        self.url = remote
        self.remote = None if remote is None else storage.root(remote, "saving.remote")
        self.rank = rank
        self.world_size = world_size
        self.agree = agree

    def clean(self) -> list[str]:
        """Removes what a death in mid-save left; call it before newest(). Rank 0 gets a line for each thing done."""
        done: list[str] = []
        self._on_rank_0("cleaning checkpoints", lambda: done.extend(_clean(self.run_dir, self.remote)))
        return done

    def save(self, step: int, shards: Iterable[Shard], state: TrainerState) -> Path:
        """Writes and commits the checkpoint of `step`; returns its folder. Nothing may change the shards meanwhile.

        state: rank 0's is written. Raises NotSaved on every rank where one couldn't write; nothing is left of the
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

    def upload(self, step: int) -> None:
        """Copies the checkpoint of `step` to the remote, if there is one. Raises NotSaved as `save` does."""
        if self.remote is None:
            return
        folder, remote = step_folder(self.run_dir, step), self.remote
        doing = f"{folder}: not copied to {self.remote}"
        self._together(doing, partial(remotes.upload_rank, folder, remote, self.rank), _nothing)
        self._on_rank_0(doing, partial(remotes.upload_run, self.run_dir, remote))
        self._on_rank_0(doing, partial(remotes.upload_commit, folder, remote))

    def load(
        self, load: Callable[[ShardReader], None], before: int | None = None, on_read: Callable[[], None] = _nothing
    ) -> tuple[CheckpointReader | None, list[str]]:
        """Gives `load` the newest whole checkpoint; every byte that it reads is verified. Collective.

        before: the step that it is to be older than, if any. on_read: called with each range that is read.
        Returns its reader (None: the run has no checkpoint yet), and why newer ones were passed over. An altered one
        gets another name, so that nothing takes it for whole again. Raises GaveUp where no committed one is whole; they
        keep their names then, and the next start raises it again.
        """
        there = every(self.run_dir, self.url) if self.rank == 0 else []
        found = (one for one in there if before is None or one.step < before)
        passed_over: list[str] = []
        altered: list[Path] = []
        # Rank 0 says which: on a shared file system another may see other folders.
        while chosen := self.agree(_next_whole(found, passed_over)):
            folder = storage.root(chosen, "checkpoint") if storage.URL.match(chosen) else Path(chosen)
            reader, failure = self._read(folder, load, on_read)
            if failure is None:
                # Not before: where none is whole, the next start would take the run for a new one.
                for each in altered:
                    self._on_rank_0(f"{each}: not renamed", partial(_set_aside, each))
                return reader, passed_over
            passed_over.append(failure)
            if isinstance(folder, Path):
                altered.append(folder)
        if reason := self.agree(passed_over[0] if passed_over else None):
            raise GaveUp(f"{self.run_dir}: none of its checkpoints is whole: {reason}")
        return None, []

    def _read(
        self, folder: Folder, load: Callable[[ShardReader], None], on_read: Callable[[], None]
    ) -> tuple[CheckpointReader | None, str | None]:
        """The reader of a folder that `load` has loaded, or what a rank found altered in it."""
        reader, failure = None, None
        try:
            reader = CheckpointReader(folder)
        except BrokenCheckpoint as error:
            failure = str(error)
        failure = self.agree(failure)
        if reader is None or failure is not None:
            return None, failure
        patient = _Patient(reader, on_read)
        load(patient)
        return reader, self.agree(patient.failure)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, here and at the remote. Raises NotSaved where they can't be."""

        def remove() -> None:
            for found in every(self.run_dir, self.url):
                if found.step > step:
                    remotes.remove(found.path)

        self._on_rank_0(f"{self.run_dir}: checkpoints after step {step} not removed", remove)

    def remove_obsolete(self, config: SavingConfig) -> list[int]:
        """Removes the checkpoints that need not stay; the steps, on rank 0. One that can't be removed now is later."""
        if self.rank == 0:
            try:
                gone = retention.apply(self.run_dir, config)
                if self.remote is not None:
                    retention.apply(self.remote, config)
                return gone
            except (OSError, MegatrainError) as error:
                log.warning("an old checkpoint was not removed: %s", error)
        return []

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
        said = f"{_BUG}rank {self.rank}: {own!r}" if bug else f"rank {self.rank}: {own}"
        failure = self.agree(None if own is None else said)
        if failure is None:
            return
        if self.rank == 0:
            undo()
        # No rank goes on before the space is free again: writing down what happened needs some.
        self.agree(None)
        if own is not None and bug:
            raise own
        raise (GaveUp if failure.startswith(_BUG) else NotSaved)(f"{doing}: {failure}") from own


class _Patient:
    """A ShardReader that gives zeros for what can't be read, and remembers why."""

    def __init__(self, reader: CheckpointReader, on_read: Callable[[], None]) -> None:
        self.reader = reader
        self.on_read = on_read
        self.failure: str | None = None

    @property
    def optimizer_step(self) -> int:
        """See ShardReader."""
        return self.reader.optimizer_step

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """See ShardReader."""
        self.on_read()
        try:
            return self.reader.read(state, name, start, stop)
        except BrokenCheckpoint as error:
            self.failure = self.failure or str(error)
            return torch.zeros(stop - start)
        except OSError as error:
            raise GaveUp(f"{self.reader.folder}: can't be read: {error}") from error


def _next_whole(found: Iterator[Found[Path] | Found[UPath]], passed_over: list[str]) -> str | None:
    """The next one that is whole as far as `problem` tells, None: there is no other; why those before it aren't."""
    for one in found:
        if one.problem is None:
            return str(one.path)
        passed_over.append(one.problem)
    return None


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def _set_aside(folder: Path) -> None:
    """Takes an altered checkpoint out of those that count; a person may look at it, or remove it."""
    broken = folder.with_name(folder.name + ".broken")
    shutil.rmtree(broken, ignore_errors=True)
    folder.rename(broken)
    sync_folder(folder.parent)


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


def _clean(run_dir: Path, remote: UPath | None) -> list[str]:
    done = [*_remove_uncommitted(run_dir), *(_remove_uncommitted(remote) if remote is not None else [])]
    for aside in checkpoints_folder(run_dir).glob("step_*.replaced"):
        folder = aside.with_suffix("")
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
            sync_folder(folder.parent)
            done.append(f"{folder}: its replacement was never committed, put back")
    return done


def _remove_uncommitted(run_dir: F) -> Iterator[str]:
    for found in scan(run_dir):
        if COMMIT not in listing(found.path):
            remotes.remove(found.path)
            yield f"{found.path}: uncommitted, removed"
