"""`megatrain train`: checks the configuration, starts the ranks of this node, gives the exit code.

Design choices:
- Ranks are started through torchrun's elastic API, but the code comes from outcome.json: torchrun turns every
  worker's code into 1, and starts a configuration error again.
- A request to stop is passed on to the ranks, which agree on a step, save and end; the elastic agent would kill them
  after 30 seconds. It reaches ranks that are still starting too: they begin with these signals blocked, and take what
  has come when they are ready for it.
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
from pathlib import Path

from megatrain import checks, layout
from megatrain.config import TrainConfig
from megatrain.doctor.node import preflight
from megatrain.errors import BUG, DONE, STOPPED
from megatrain.resilience.outcome import clear_outcome, read_outcome, write_outcome
from megatrain.resilience.parent import LAUNCHER
from megatrain.resilience.stopping import SIGNALS

FORWARD_SECONDS = 0.2
"""How often a rank that has not been told to stop is looked for."""
MEETING_SECONDS = 5.0
"""How long after a request to stop the launcher still waits for other nodes."""
SURVIVOR_SECONDS = 10
"""How long the other ranks may take to end once one has failed."""


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
    clear_outcome(run_dir)
    failed = _launch(config, processes, arguments, requests)
    return _exit_code(run_dir, failed, requests.received)


def _accelerators() -> int:
    from megatrain import device

    return device.count()


class _Requests:
    """Passes the first request to stop on to the ranks; they ignore further ones.

    received: the signal's name, None so far.
    """

    def __init__(self, run_dir: Path, nodes: int) -> None:
        self.received: str | None = None
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
                os._exit(_exit_code(self._run_dir, None, self.received))
            time.sleep(FORWARD_SECONDS)


@dataclass(frozen=True)
class _Failure:
    """What the launcher sees of a run that failed. certain: the ranks can't know it better."""

    exit_code: int
    reason: str
    certain: bool = False


def _launch(config: TrainConfig, processes: int, arguments: Sequence[str], requests: _Requests) -> _Failure | None:
    """Runs the ranks to their end. None if all ended well, else what the rank that failed first died of."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
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
        run_id=Path(config.run_dir).name or "megatrain",
        rdzv_backend="c10d",
        rdzv_endpoint=config.launch.rendezvous or "localhost:0",
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
            return _Failure(BUG, f"{who} was killed by signal {-first.exitcode}", certain=True)
        return _Failure(first.exitcode, f"{who} ended with exit code {first.exitcode}")
    except RendezvousConnectionError:
        return _Failure(BUG, f"the launcher that keeps launch.rendezvous={config.launch.rendezvous} is gone")
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
