"""A rank that dies or hangs ends the run, with one line that names it.

Each rank has a thread that says every heartbeat, over the CPU store, where its main thread is (progress.py), and looks
at what the others say (beats.py). The first to find a reason puts it into the store as the verdict. All ranks then
write outcome.json, where the first wins, dump the stacks of their threads into run_dir/stacks and what their flight
recorders have into run_dir/flight_recorder, and end.

Design choices:
- os._exit: the main thread is in a collective that will never return.
- A rank that fails by itself tells the verdict as it ends, so the others needn't run into a timeout.
- A broken communication is a symptom. The rank that meets it asks its watchdog who is gone before it speaks of it.
- The store may have died with its node. Each exchange with it runs in a thread of its own, on its own client, and is
  given up after the timeout; its loss is a reason too.
- Time in which this process itself didn't run (a suspended job) isn't counted: nobody looks hung after it.
- What may block on a dead file system, the outcome and the stacks, is given WRITE_SECONDS. So is the flight recorder,
  which may block on a dead device, in a thread of its own; in beats it is asked only once a rank has stood still for
  long, and a beat doesn't wait for its answer.
- Each hang has a folder of its own for what the flight recorders had: the analyzer would take traces of different hangs
  for one.
- A rank that was killed on the launcher's own node is left to the launcher, which knows the signal.
- A silent rank of this node gets a SIGCONT: a stopped one then finds the verdict and ends like the others. torchrun
  would wait half a minute before it kills it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.errors import BUG
from megatrain.resilience.beats import SILENT_BEATS, Beat, Beats
from megatrain.resilience.collectives import GroupRecord, Recorder
from megatrain.resilience.files import write_whole
from megatrain.resilience.outcome import write_outcome
from megatrain.resilience.parent import LAUNCHER
from megatrain.resilience.progress import Progress
from megatrain.resilience.stragglers import Stragglers

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

WRITE_SECONDS = 5.0
"""How long the end may take: outcome, stacks, a last word to the store."""
HURRY_SECONDS = 0.2
"""How often is looked once communication has failed."""


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    found: by a watchdog, not told by the rank that failed; then stacks say more.
    traces: of a hang, the folder for what the flight recorders have.
    left_to: host and process id of the launcher that will say it better; its own ranks are silent.
    """

    exit_code: int
    reason: str
    found: bool
    left_to: tuple[str, int] | None = None
    traces: str | None = None


class Watchdog:
    """Watches from start() to stop(), or to the end of the process.

    store: a client of its own. attempt: names this start of the run; a restart may meet the same store.
    timeout: seconds without a beat, or without progress of a main thread, after which a rank counts as dead or hung.
    stragglers: is shown the paces of all ranks; one rank's is enough. recorder: of this rank's collectives.
    """

    def __init__(
        self,
        progress: Progress,
        store: Store,
        attempt: str,
        run_dir: Path,
        rank: int,
        world_size: int,
        heartbeat: float,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        end_process: Callable[[int], object] = os._exit,
        stragglers: Stragglers | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.progress = progress
        self.store = store
        self.run_dir = run_dir
        self.rank = rank
        self.heartbeat = heartbeat
        self.timeout = timeout
        self.home = socket.gethostname(), os.getppid()
        self.beats = Beats(world_size, self.home, heartbeat, timeout, first_step=progress.place.step)
        self._keys = [f"watchdog/{attempt}/{each}" for each in range(world_size)]
        self._verdict_key = f"watchdog/{attempt}/verdict"
        self._clock = clock
        self._end_process = end_process
        self._stragglers = stragglers
        self._recorder = recorder
        self._asks = ThreadPoolExecutor(1, "flight-recorder")
        self._asked: Future[tuple[GroupRecord, ...]] | None = None
        self._answer: tuple[GroupRecord, ...] = ()
        self._now, self._looked = 0.0, clock()
        self._place, self._since = progress.place, 0.0
        self._number = 0
        self._told: Verdict | None = None
        self._leaving = False
        self._communication_failed = False
        self._wake = threading.Event()
        self._exchanges = ThreadPoolExecutor(1, "watchdog-store")
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch. Where the main thread is now counts as the first step of this start."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch: the others won't miss this rank. Blocks for WRITE_SECONDS at most."""
        self._leaving = True
        self._wake.set()
        self._thread.join(WRITE_SECONDS)

    def tell(self, exit_code: int, reason: str) -> None:
        """Ends the other ranks for this one's own failure, which it has written down already; ends the watch."""
        self._told = Verdict(exit_code, reason, found=False)
        self.stop()

    def ask_who_is_gone(self) -> None:
        """For the main thread when communication has failed. Returns only if every other rank still beats."""
        self._communication_failed = True
        self._wake.set()
        self._thread.join((SILENT_BEATS + 2) * self.heartbeat + HURRY_SECONDS)

    def look(self) -> None:
        """Beats once, looks at the others, and ends the process where there is a reason."""
        looked = self._clock()
        self._now += min(looked - self._looked, 2 * self.heartbeat)
        self._looked = looked
        try:
            verdict = self._exchanges.submit(self._exchange).result(self.timeout)
        except TimeoutError:
            verdict = self._store_lost(f"no answer for {self.timeout:.0f} s")
        except RuntimeError as error:
            verdict = self._store_lost(" ".join(str(error).split()))
        if verdict is not None and not self._leaving:
            self._end(verdict)

    def _run(self) -> None:
        while not self._leaving:
            self.look()
            self._wake.wait(HURRY_SECONDS if self._communication_failed else self.heartbeat)
            self._wake.clear()
        wait([self._exchanges.submit(self._exchange)], WRITE_SECONDS)

    def _exchange(self) -> Verdict | None:
        """Beats, takes the others' beats; the verdict, if there is one by now."""
        place = self.progress.place
        if place is not self._place:
            self._place, self._since = place, self._now
        self._number += 1
        standing = round(self._now - self._since, 3)
        pace, records = self.progress.meter.pace(), self._records()
        own = Beat(self._number, *self.home, os.getpid(), place, standing, self._leaving, pace, records)
        self.store.set(self._keys[self.rank], own.encode())
        self._take_beats()
        if self._stragglers is not None:
            self._stragglers.look(self.beats.paces())
        verdict = self._told or self._find()
        if self.store.check([self._verdict_key]):
            return _decode(self.store.get(self._verdict_key))
        if verdict is None:
            return None
        return _decode(self.store.compare_set(self._verdict_key, "", json.dumps(asdict(verdict))))

    def _records(self) -> tuple[GroupRecord, ...]:
        """What the flight recorder answered the beat before, or last, while a rank stands still."""
        if self._recorder is None or not self.beats.stalled():
            self._asked, self._answer = None, ()
            return ()
        if self._asked is not None and self._asked.done():
            self._answer = () if self._asked.exception() else self._asked.result()
            self._asked = None
        if self._asked is None:
            self._asked = self._asks.submit(self._recorder.records)
        return self._answer

    def _take_beats(self) -> None:
        # A get of what isn't there yet would wait for it.
        all_there = self.store.check(self._keys)
        ranks = [rank for rank, key in enumerate(self._keys) if all_there or self.store.check([key])]
        beats = self.store.multi_get([self._keys[rank] for rank in ranks])
        self.beats.take(dict(zip(ranks, beats, strict=True)), self._now)

    def _find(self) -> Verdict | None:
        if gone := self.beats.gone():
            return Verdict(BUG, gone, found=True, left_to=self.home if LAUNCHER in os.environ else None)
        reason = self.beats.verdict(self._now, self._communication_failed)
        if reason is None:
            return None
        traces = None if self._communication_failed else time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        return Verdict(BUG, reason, found=True, traces=traces)

    def _store_lost(self, what: str) -> Verdict:
        host = os.environ.get("MASTER_ADDR", "unknown")
        reason = f"rank {self.rank} ({self.home[0]}) lost the store on {host} while {self._place}: {what}"
        return Verdict(BUG, reason, found=True)

    def _end(self, verdict: Verdict) -> None:
        deadline = time.monotonic() + WRITE_SECONDS
        writing = threading.Thread(target=self._write_down, args=(verdict,), daemon=True)
        tracing = threading.Thread(target=self._write_trace, args=(verdict,), daemon=True)
        for each in (writing, tracing):
            each.start()
        for each in (writing, tracing):
            each.join(max(0.0, deadline - time.monotonic()))
        if writing.is_alive():
            print(f"megatrain train: {verdict.reason}; {self.run_dir} can't be written", file=sys.stderr, flush=True)
        if verdict.found and not self._communication_failed:
            # Until the others have looked: once this rank is gone, they would be seen failing, not waiting.
            self._wake.wait(min(self.heartbeat, WRITE_SECONDS))
        for pid in self.beats.silent_siblings(self._now):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._end_process(verdict.exit_code)

    def _write_down(self, verdict: Verdict) -> None:
        if verdict.left_to != self.home and self._is_first(verdict):
            print(f"megatrain train: {verdict.reason}", file=sys.stderr, flush=True)
        if verdict.found:
            with suppress(OSError):
                self._dump_stacks(verdict.reason)

    def _is_first(self, verdict: Verdict) -> bool:
        steps_done = self.progress.place.steps_done
        try:
            return write_outcome(self.run_dir, verdict.exit_code, verdict.reason, steps_done, self.rank)
        except OSError:
            return True  # No space even for this: the terminal has it.

    def _dump_stacks(self, reason: str) -> None:
        path = self.run_dir / "stacks" / f"rank_{self.rank:05d}.txt"
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            file.write(f"{reason}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _write_trace(self, verdict: Verdict) -> None:
        if self._recorder is None or verdict.traces is None:
            return
        path = self.run_dir / "flight_recorder" / verdict.traces / f"rank_{self.rank:05d}"
        with suppress(OSError, RuntimeError, ValueError):  # Of the disk, of torch, of what torch answered.
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self._recorder.trace())


def _decode(raw: bytes) -> Verdict:
    fields = json.loads(raw)
    left_to = fields.pop("left_to")
    return Verdict(**fields, left_to=tuple(left_to) if left_to else None)
