"""`megatrain train`: checks the configuration, starts the ranks of this node, again after a crash; gives the exit code.

Design choices:
- Ranks are started through torchrun's elastic API, but the code comes from outcome.json: torchrun turns every
  worker's code into 1, and starts a configuration error again.
- A request to stop is passed on to the ranks, which agree on a step, save and end; the elastic agent would kill them
  after 30 seconds. It reaches ranks that are still starting too: they begin with these signals blocked, and take what
  has come when they are ready for it.
- The elastic agent's own restarts aren't used: it would start again what has given up. After a crash the agents of all
  nodes end, and new ones meet, if the launcher that has the lease says so.
- No torch until the configuration has been checked: a wrong key is answered in a second.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain import checks, layout
from megatrain.config import TrainConfig
from megatrain.doctor.node import preflight
from megatrain.errors import BUG, DONE, GAVE_UP, STOPPED
from megatrain.observe.events import EventLog
from megatrain.observe.records import read
from megatrain.resilience.crashes import CRASH, STOP, crash_loop
from megatrain.resilience.lease import Lease, end_at_once, start_name
from megatrain.resilience.outcome import clear_outcome, read_outcome, write_outcome
from megatrain.resilience.parent import LAUNCHER
from megatrain.resilience.stopping import SIGNALS

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

FORWARD_SECONDS = 0.2
"""How often a rank that has not been told to stop is looked for."""
MEETING_SECONDS = 5.0
"""How long after a request to stop the launcher still waits for other nodes."""
SURVIVOR_SECONDS = 10
"""How long the other ranks may take to end once one has failed."""
EVENTS = "events.jsonl"
AGAIN_SECONDS = 120
"""How long after a crash launchers wait for each other: to hear from the one with the lease, then to meet."""


def run(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Trains on this node and returns the run's exit code. Raises InputError before anything is spawned."""
    checks.check(config)
    processes = config.launch.processes or _accelerators() or 1
    layout.check_ranks(config, processes * config.launch.nodes, processes)
    checks.check_writable(config)
    if config.resilience.preflight:
        preflight(Path(config.run_dir))
    run_dir = Path(config.run_dir)
    requests = _Requests(run_dir, config.launch.nodes)
    run_dir.mkdir(parents=True, exist_ok=True)
    lease = Lease(run_dir, start_name(config.launch.nodes, config.launch.rendezvous), end_at_once)
    lease.take()
    requests.lease = lease
    try:
        return _train(config, processes, arguments, requests, lease)
    finally:
        lease.release()


def _train(config: TrainConfig, processes: int, arguments: Sequence[str], requests: _Requests, lease: Lease) -> int:
    """Starts the ranks, and again as often as they may crash; the run's exit code."""
    run_dir, restarts = Path(config.run_dir), config.resilience.restarts
    launchers = _Launchers(config, lease.kept)
    if lease.kept and lease.dead:
        _note_crash(run_dir, f"{lease.dead} ended without a word")
    for start in range(1 + restarts):
        gone, loop = launchers.agree(start, _loop(config, lease))
        if loop:
            return _give_up(run_dir, loop, lease)
        if start and lease.kept:
            print(f"megatrain train: restart {start} of {restarts}", file=sys.stderr)
        clear_outcome(run_dir)
        failure = gone or _launch(config, processes, arguments, requests, start)
        code = _exit_code(run_dir, failure, requests.received)
        if code != BUG or failure is None or not failure.of_ranks:
            return code
        if lease.kept:
            _note_crash(run_dir, failure.reason)
        if requests.received:
            return code
    loop = _loop(config, lease)
    return _give_up(run_dir, loop, lease) if loop else BUG


def _loop(config: TrainConfig, lease: Lease) -> str | None:
    """The line that ends a crash loop, or None. One launcher counts: the file is its to write while no rank lives."""
    events = Path(config.run_dir) / EVENTS
    return crash_loop(read(events), config.resilience.crash_loop) if lease.kept else None


def _note_crash(run_dir: Path, reason: str) -> None:
    """Writes an event of the step that was trained last, as far as it is known; none where the run had ended before."""
    outcome = read_outcome(run_dir)
    if outcome is not None and outcome.exit_code != BUG:
        return
    if outcome is not None:
        reason = outcome.reason
    step: object = None if outcome is None else outcome.step
    if step is None:
        for record in read(run_dir / "metrics.jsonl"):
            step = record["step"]
    _write_event(run_dir, CRASH, step, reason)


def _give_up(run_dir: Path, loop: str, lease: Lease) -> int:
    """Ends a crash loop."""
    if lease.kept:
        print(f"megatrain train: {loop}", file=sys.stderr)
        with suppress(OSError):
            clear_outcome(run_dir)
            write_outcome(run_dir, GAVE_UP, loop, step=None, rank=None)
        _write_event(run_dir, STOP, None, loop)
    return GAVE_UP


def _write_event(run_dir: Path, event: str, step: object, reason: str) -> None:
    with suppress(OSError):  # Perhaps there is no space for it.
        log = EventLog(run_dir / EVENTS)
        log.write(event, step if isinstance(step, int) else 0, reason=reason)
        log.close()


def _accelerators() -> int:
    from megatrain import device

    return device.count()


class _Requests:
    """Passes the first request to stop on to the ranks; they ignore further ones.

    received: the signal's name, None so far. lease: is released where this ends the process.
    """

    def __init__(self, run_dir: Path, nodes: int) -> None:
        self.received: str | None = None
        self.lease: Lease | None = None
        self._run_dir = run_dir
        self._nodes = nodes
        # Python writes the number of each signal that has a handler into the pipe, whatever the main thread is doing.
        signals, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._forward, args=(signals,), name="requests", daemon=True).start()
        # The main thread starts the ranks, and they inherit this; the new thread stays open to the signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _forward(self, signals: int) -> None:
        """Waits for a request, then tells every rank there is and every one that still appears."""
        import psutil

        while (number := os.read(signals, 1)[0]) not in SIGNALS:
            pass
        self.received = signal.Signals(number).name
        waits_until = time.monotonic() + MEETING_SECONDS
        told: set[int] = set()
        while True:
            for rank in psutil.Process().children():
                if rank.pid not in told:
                    with suppress(psutil.NoSuchProcess):
                        rank.send_signal(number)
                    told.add(rank.pid)
            if not told and self._nodes > 1 and time.monotonic() > waits_until:
                # The main thread waits for the other nodes, which may never come.
                code = _exit_code(self._run_dir, None, self.received)
                if self.lease is not None:
                    self.lease.release()
                os._exit(code)
            time.sleep(FORWARD_SECONDS)


@dataclass(frozen=True)
class _Failure:
    """What the launcher sees of a run that failed. certain: the ranks can't know it better. of_ranks: they ran."""

    exit_code: int
    reason: str
    certain: bool = False
    of_ranks: bool = False


class _Launchers:
    """What the launchers of a start, one a node, tell each other: the one with the lease decides for all.

    The store is kept from the first start to the end: who is back first finds the others there.
    """

    def __init__(self, config: TrainConfig, decides: bool) -> None:
        self._launch = config.launch
        self._decides = decides
        self._store: Store | None = None

    def agree(self, start: int, loop: str | None) -> tuple[_Failure | None, str | None]:
        """Why the others can't be reached; and the deciding one's `loop`, the reason not to start the ranks."""
        if self._launch.nodes == 1:
            return None, loop
        from torch.distributed import DistError, DistStoreError
        from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

        nodes, key = self._launch.nodes, f"megatrain/start/{start}"
        try:
            if self._store is None:
                _, self._store = create_backend(
                    RendezvousParameters("c10d", self._launch.rendezvous or "", "launchers", nodes, nodes)
                )
            if self._decides:
                self._store.set(key, loop or "")
                return None, loop
            self._store.wait([key], timedelta(seconds=AGAIN_SECONDS))
            return None, self._store.get(key).decode() or None
        except DistStoreError:
            return _Failure(BUG, f"the launcher that has the lease said nothing for {AGAIN_SECONDS} s"), None
        except (RendezvousConnectionError, DistError):
            return _unreachable(self._launch.rendezvous), None


def _unreachable(rendezvous: str | None) -> _Failure:
    return _Failure(BUG, f"the launcher that keeps launch.rendezvous={rendezvous} is gone")


def _launch(
    config: TrainConfig, processes: int, arguments: Sequence[str], requests: _Requests, start: int
) -> _Failure | None:
    """Runs the ranks to their end. None if all ended well, else what the rank that failed first died of."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its reports of a failed rank repeat, over forty lines, what the rank has said in one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Threads that wait for work sleep: after the loader's small operations they would spin, beside the ranks' own.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launch = LaunchConfig(
        min_nodes=config.launch.nodes,
        max_nodes=config.launch.nodes,
        nproc_per_node=processes,
        run_id=f"{Path(config.run_dir).name}.{start}",
        rdzv_backend="c10d",
        rdzv_endpoint=config.launch.rendezvous or "localhost:0",
        # One node's ranks meet there too: the machine's own name needn't resolve.
        local_addr="localhost" if config.launch.nodes == 1 else None,
        rdzv_configs={"join_timeout": AGAIN_SECONDS} if start else {},
        max_restarts=0,
        monitor_interval=0.1,
        # Requests to stop are ours; what is left means that nobody is there any more.
        signals_to_handle="SIGHUP,SIGQUIT",
        shutdown_timeout=SURVIVOR_SECONDS,
        # Ranks write to the terminal; without this every start leaves an empty folder in /tmp.
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    if requests.received:
        return None
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "megatrain.train", *arguments)
    except ChildFailedError as error:
        # Times are whole seconds. Of ranks that failed in the same one, a killed one made the others fail.
        failures = error.failures.items()
        rank, first = min(failures, key=lambda item: (item[1].timestamp, item[1].exitcode >= 0))
        who = f"rank {rank} ({socket.gethostname()})"
        if first.exitcode < 0:
            return _Failure(BUG, f"{who} was killed by signal {-first.exitcode}", certain=True, of_ranks=True)
        return _Failure(first.exitcode, f"{who} ended with exit code {first.exitcode}", of_ranks=True)
    except RendezvousConnectionError:
        return _unreachable(config.launch.rendezvous)
    except RendezvousTimeoutError:
        return _Failure(BUG, f"launch.nodes={config.launch.nodes}: not all came to {config.launch.rendezvous} in time")
    return None


def _exit_code(run_dir: Path, failure: _Failure | None, received: str | None) -> int:
    """The run's exit code: what a rank has said, else what can be told from outside."""
    outcome = read_outcome(run_dir)
    if failure and (failure.certain or (failure.exit_code == BUG and outcome is None)):
        print(f"megatrain train: {failure.reason}", file=sys.stderr)
    if outcome is not None:
        return outcome.exit_code
    if failure is None and received:
        failure = _Failure(STOPPED, f"{received} before the first step")
    if failure is None:
        return DONE  # Another node's ranks write the outcome where run_dir isn't shared.
    with suppress(OSError):  # Perhaps there is no space for it.
        write_outcome(run_dir, failure.exit_code, failure.reason, step=None, rank=None)
    return failure.exit_code
