"""Who trains in a run directory: lease.json, renewed for as long as a launcher lives. A second run is refused.

Design choices:
- No clocks are compared: hosts differ. Who finds a lease watches whether it changes; a dead one doesn't.
- Its holder's process is looked up only where it would be visible: same boot, same PID namespace. There a dead holder
  is replaced at once, elsewhere after WATCH_SECONDS.
- A renewal touches the file: its text never changes, so a reader sees all of it. A lease is linked into place (law 6),
  and a dead one is renamed away; who moved a lease that wasn't the dead one puts it back.
- A holder that has lost its lease (it was suspended, and somebody took over) ends at once: there may be one writer.
- All launchers of a start share the lease; the first to come holds it. Under plain torchrun rank 0 does.
- Slurm runs a job once at a time. A holder of the same job, of a start before its requeue, is on a node that Slurm has
  lost but that still sees the file system: the later start takes its lease, and gives it the time to notice.
- Asked of the file system: link and rename are atomic, and a file that is opened anew shows when it was modified: so do
  local disks, NFS (close-to-open), Lustre and GPFS.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from megatrain.errors import GAVE_UP, GaveUp, bad_value
from megatrain.resilience.files import temporary_beside, write_synced

LEASE = "lease.json"
BEAT_SECONDS = 2.0
"""How often the holder renews its lease."""
WATCH_SECONDS = 20.0
"""A lease that doesn't change for so long is a dead launcher's."""
LOOK_SECONDS = 0.2
LAST_BEATS = 3
"""After so many of its beats a holder has seen that its lease was taken."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    start: what the launchers of one start have in common. machine: where its process id means something.
    job: its Slurm job, if it has one. requeues: how often that was requeued before.
    """

    id: str
    start: str
    host: str
    pid: int
    machine: str
    job: str | None
    requeues: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


@dataclass(frozen=True)
class _Seen:
    """A lease file as it was found. A damaged one has no holder."""

    holder: Holder | None
    text: bytes
    modified: int


class Lease:
    """The right to train in run_dir, from take() to release().

    kept: this launcher renews it; False: another one of the same start does. dead: whose lease it was, where the former
    holder died without releasing it. lost: called, in a thread, with the line that says who has it now.
    """

    def __init__(
        self,
        run_dir: Path,
        start: str,
        lost: Callable[[str], object],
        beat_seconds: float = BEAT_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self.run_dir = run_dir
        self.path = run_dir / LEASE
        self.kept = False
        self.dead: Holder | None = None
        job, requeues = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._own = Holder(uuid4().hex, start, socket.gethostname(), os.getpid(), _machine(), job, requeues)
        self._lost = lost
        self._beat_seconds = beat_seconds
        self._watch_seconds = watch_seconds
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def take(self) -> None:
        """Waits until it is known whether another run holds the lease.

        Raises InputError where one does, GaveUp where the lease can't be written (a full disk).
        """
        try:
            self._take()
        except OSError as error:
            raise GaveUp(f"{self.path}: {error}") from error

    def _take(self) -> None:
        leaving = False
        while not self._create():
            seen = self._look()
            if seen is None:
                continue  # It has just been released.
            leaving = self._follows(seen.holder)
            if leaving or _is_gone(seen.holder) or (found := self._watch(seen)) == seen:
                self._put_aside(seen)
                self.dead = seen.holder
            elif found is None or found.text != seen.text or seen.holder is None:
                continue
            elif seen.holder.start == self._own.start:
                return
            else:
                legal = f"{seen.holder} trains in it; legal: another run_dir, or this one when that has ended"
                raise bad_value("run_dir", self.run_dir, legal)
        self.kept = True
        self._thread.start()
        if leaving:
            time.sleep(LAST_BEATS * self._beat_seconds)

    def release(self) -> None:
        """Lets the next start in at once. A second call changes nothing."""
        if self._released.is_set() or not self.kept:
            return
        self._released.set()
        self._thread.join(self._beat_seconds)
        with suppress(OSError):
            if (seen := self._look()) and seen.holder == self._own:
                self.path.unlink()

    def _create(self) -> bool:
        temporary = temporary_beside(self.path)
        try:
            write_synced(temporary, json.dumps(asdict(self._own)).encode() + b"\n")
            self.path.hardlink_to(temporary)
        except FileExistsError:
            seen = self._look()  # NFS may ask a server again that has linked it already.
            return seen is not None and seen.holder == self._own
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _look(self) -> _Seen | None:
        try:
            with self.path.open("rb") as file:
                text, modified = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            return _Seen(Holder(**json.loads(text)), text, modified)
        except (ValueError, TypeError):
            return _Seen(None, text, modified)

    def _follows(self, holder: Holder | None) -> bool:
        """Whether this is the holder's job after a requeue."""
        return (
            holder is not None
            and holder.job is not None
            and holder.job == self._own.job
            and holder.requeues < self._own.requeues
        )

    def _watch(self, seen: _Seen) -> _Seen | None:
        """What the lease has become; `seen` where it didn't change for long."""
        ends = time.monotonic() + self._watch_seconds
        while (found := self._look()) == seen and time.monotonic() < ends:
            time.sleep(LOOK_SECONDS)
        return found

    def _put_aside(self, seen: _Seen) -> None:
        aside = temporary_beside(self.path)
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_bytes() != seen.text:  # Of another start, which was faster.
                with suppress(FileExistsError):
                    self.path.hardlink_to(aside)
            aside.unlink()

    def _run(self) -> None:
        while not self._released.wait(self._beat_seconds):
            with suppress(OSError):  # A server that is away; who has the lease shows when it is back.
                self._renew()

    def _renew(self) -> None:
        seen = self._look()
        if seen is None:
            self._create()  # Somebody has removed the file.
        elif seen.holder == self._own:
            os.utime(self.path)
        else:
            self._released.set()
            why = "this process stood still too long, or its job was requeued"
            self._lost(f"lost run_dir={self.run_dir} to {seen.holder or 'somebody'}: {why}")


def start_name(nodes: int, rendezvous: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """What all launchers of a start, and no others that live, have in common: their Slurm step, or where they meet."""
    if nodes == 1:
        return f"alone {uuid4().hex}"
    if "SLURM_STEP_ID" in environment:
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        return "slurm " + ".".join(environment.get(name, "0") for name in names)
    return f"rendezvous {rendezvous}"


def end_at_once(line: str) -> None:
    """What becomes of a process that has lost its lease. Its ranks end with it (parent.py)."""
    print(f"megatrain train: {line}", file=sys.stderr, flush=True)
    os._exit(GAVE_UP)


def _machine() -> str:
    """Differs between kernels, boots and PID namespaces."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid4().hex  # Not Linux: nobody's process is looked up.


def _is_gone(holder: Holder | None) -> bool:
    """Whether the holder's process has surely ended."""
    if holder is None or holder.machine != _machine():
        return False
    try:
        return bool(psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
