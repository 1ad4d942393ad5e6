"""Saves while training goes on: it stops for a copy to host memory, a thread does the rest.

Design choices:
- One save at a time. One that is still running when the next is due is waited for, or the next is left out: as
  configured, and on all ranks alike.
- A save that fails is tried again from the same copy, then reported; the run goes on, and the next save is a new one.
  Only a bug ends the run.
- The thread uses no collective: it would get between those of the training. Ranks agree over the CPU store.
- The thread says where it is by a Progress of its own, which the main thread takes over while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import Agree, CheckpointManager, NotSaved, alone
from megatrain.checkpoint.snapshot import Snapshot
from megatrain.config import SavingConfig, WhenBusy
from megatrain.engines.ranges import Shard
from megatrain.resilience.progress import Progress


@dataclass(frozen=True)
class Save:
    """What came of a save, on every rank alike.

    attempts: to write it. seconds: from the beginning of the copy to the commit or the last failure.
    failure: why there is no checkpoint; None: there is. not_uploaded: why it isn't where saving.remote says.
    removed: steps whose checkpoints it made obsolete.
    """

    step: int
    attempts: int
    seconds: float
    failure: str | None
    not_uploaded: str | None = None
    removed: Sequence[int] = ()


class BackgroundSaver:
    """Every rank has one and makes the same calls, from its main thread. longest_seconds: of the saves so far."""

    def __init__(
        self,
        manager: CheckpointManager,
        config: SavingConfig,
        progress: Progress,
        background: Progress,
        agree_on_busy: Agree = alone,
    ) -> None:
        """manager: agrees over a client of the store that nobody else uses, and tells `background`.

        progress: the main thread's. agree_on_busy: over another client.
        """
        self.manager = manager
        self.config = config
        self.progress = progress
        self.background = background
        self.agree_on_busy = agree_on_busy
        self.longest_seconds: float | None = None
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Save] | None = None

    def ready(self) -> bool:
        """Whether a save may begin; False: one is running, on some rank, and saving.when_busy is skip."""
        if self.config.when_busy is WhenBusy.wait:
            self.wait()
            return True
        running = self._running is not None and not self._running.done()
        return self.agree_on_busy("busy" if running else None) is None

    def begin(self, step: int, shards: Callable[[], Iterable[Shard]], state: TrainerState) -> None:
        """Begins to save; returns when the copy is taken: the shards may change then.

        shards: live views; they are asked for more than once where no copy is taken (saving.asynchronous=false).
        """
        assert self._running is None, "the save before is not collected"
        began = time.perf_counter()
        self.background.at(step, "save")
        held = shards
        if self.config.asynchronous:
            self._snapshot.take(self.progress.pieces(shards()))
            held = self._snapshot.shards
        self._running = self._thread.submit(self._save, step, held, state, began)
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is running."""
        running = self._running
        if running is not None:
            self.progress.follow(self.background, lambda seconds: bool(wait([running], seconds).done))

    def collect(self) -> Save | None:
        """What came of the save that ended since the last call, if one did. A bug in it is raised here."""
        if self._running is None or not self._running.done():
            return None
        save, self._running = self._running.result(), None
        self.longest_seconds = max(save.seconds, self.longest_seconds or 0.0)
        return save

    def _save(self, step: int, shards: Callable[[], Iterable[Shard]], state: TrainerState, began: float) -> Save:
        """The thread's work."""
        attempts, failure = self._try(lambda: self.manager.save(step, self.background.pieces(shards()), state))
        seconds = time.perf_counter() - began
        if failure is not None:
            return Save(step, attempts, seconds, failure)
        _, not_uploaded = self._try(lambda: self.manager.upload(step))
        return Save(step, attempts, seconds, None, not_uploaded, self.manager.remove_obsolete(self.config))

    def _try(self, work: Callable[[], object]) -> tuple[int, str | None]:
        """Does it, and again where it fails; the attempts, and why the last one failed. Alike on all ranks."""
        attempts = 1
        while True:
            try:
                work()
            except NotSaved as error:
                if attempts > self.config.retries:
                    return attempts, str(error)
            else:
                return attempts, None
            attempts += 1
            time.sleep(self.config.retry_seconds)
