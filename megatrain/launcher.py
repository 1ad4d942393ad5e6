"""`megatrain train`: checks the configuration, starts the ranks of this node, gives the exit code.

Design choices:
- Ranks are started through torchrun's elastic API, but the code comes from outcome.json: torchrun turns every
  worker's code into 1, and starts a configuration error again.
- A request to stop is passed on to the ranks, which agree on a step, save and end; the elastic agent would kill them
  after 30 seconds.
- No torch until the configuration has been checked: a wrong key is answered in a second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatrain import checks
from megatrain.config import TrainConfig
from megatrain.errors import BUG, DONE, STOPPED
from megatrain.resilience.outcome import clear_outcome, read_outcome, write_outcome
from megatrain.resilience.stopping import SIGNALS


def run(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Trains on this node and returns the run's exit code. Raises InputError before anything is spawned."""
    checks.check(config)
    processes = config.launch.processes or _accelerators() or 1
    checks.check_ranks(config, processes * config.launch.nodes)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    clear_outcome(run_dir)
    forwarding = _Forwarding()
    failed = _launch(config, processes, arguments)
    return _exit_code(run_dir, failed, forwarding.received)


def _accelerators() -> int:
    from megatrain import device

    return device.count()


class _Forwarding:
    """Passes requests to stop on to the ranks. They ignore a second one."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        import psutil

        self.received = signal.Signals(number).name
        for child in psutil.Process().children():
            child.send_signal(number)


def _launch(config: TrainConfig, processes: int, arguments: Sequence[str]) -> int | None:
    """Runs the ranks to their end. None if all ended well, else the exit code of the one that failed first."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its reports of a failed rank repeat, over forty lines, what the rank has said in one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
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
    )
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "megatrain.train", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode
    return None


def _exit_code(run_dir: Path, failed: int | None, received: str | None) -> int:
    """The run's exit code: what a rank has said, else what can be told from outside."""
    outcome = read_outcome(run_dir)
    if outcome is not None:
        return outcome.exit_code
    if received is not None:
        write_outcome(run_dir, STOPPED, f"{received} before the first step", step=None, rank=None)
        return STOPPED
    if failed is None:
        return DONE  # Another node's ranks write the outcome where run_dir isn't shared.
    code = failed if failed > 0 else BUG
    reason = f"a rank ended with exit code {failed}" if failed >= 0 else f"a rank was killed by signal {-failed}"
    print(f"megatrain train: {reason}", file=sys.stderr)
    write_outcome(run_dir, code, reason, step=None, rank=None)
    return code
