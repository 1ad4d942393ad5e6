"""`megatrain doctor`: is this node, this cluster, fit to train?

Design choices:
- One process that needs no torch looks at one node. With more, ranks are started as for training, by the same command
  on each node: they measure the network too, and rank 0 prints the table of all.
- Exit code 3 where something isn't well: a start won't help before somebody has acted.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence

from megatrain.command_config import DoctorConfig
from megatrain.doctor import diagnosis
from megatrain.doctor.node import examine
from megatrain.errors import DONE, GaveUp, bad_value
from megatrain.resilience.parent import LAUNCHER


def run(config: DoctorConfig, arguments: Sequence[str]) -> int:
    """Prints a table and the problems. 0: all is well, 3: something isn't. Raises InputError, GaveUp."""
    _check(config)
    processes = config.launch.processes or _accelerators() or 1
    if processes * config.launch.nodes > 1:
        return _launch(config, processes, arguments)
    return diagnosis.show(diagnosis.of_nodes([examine(config)]))


def _check(config: DoctorConfig) -> None:
    """Raises InputError."""
    for key in ("megabytes", "clock_skew_seconds", "xid_hours", "launch.nodes", "launch.processes"):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and value <= 0:  # type: ignore[operator]
            raise bad_value(key, value, "legal: above 0")
    if config.launch.nodes > 1 and not config.launch.rendezvous:
        raise bad_value("launch.rendezvous", "null", f"launch.nodes={config.launch.nodes} need HOST:PORT to meet at")


def _accelerators() -> int:
    from megatrain import device

    return device.count()


def _launch(config: DoctorConfig, processes: int, arguments: Sequence[str]) -> int:
    """Runs the ranks of this node; the code that they ended with. Raises GaveUp."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its reports of a failed rank repeat, over forty lines, what the rank has said in one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch = LaunchConfig(
        min_nodes=config.launch.nodes,
        max_nodes=config.launch.nodes,
        nproc_per_node=processes,
        run_id="megatrain-doctor",
        rdzv_backend="c10d",
        rdzv_endpoint=config.launch.rendezvous or "localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "megatrain.doctor.rank", *arguments)
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode >= 0))
        if first.exitcode < 0:
            host = socket.gethostname()
            raise GaveUp(f"rank {rank} ({host}) was killed by signal {-first.exitcode}") from None
        return int(first.exitcode)
    except RendezvousConnectionError:
        raise GaveUp(f"launch.rendezvous={config.launch.rendezvous}: can't be reached") from None
    return DONE
