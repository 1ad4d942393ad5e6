"""What a heartbeat costs a rank, in CPU time: with the default of one each 5 seconds below 0.5% of a core."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatrain.resilience.progress import Progress
from megatrain.resilience.stragglers import WINDOW, Stragglers
from megatrain.resilience.watchdog import Watchdog
from megatrain.resilience_config import ResilienceConfig
from tests.resilience.stores import tcp_stores

SHARE = 0.005
LOOKS = 10


@pytest.mark.parametrize("ranks", [8, 512])
def test_a_heartbeat_is_cheap(ranks: int, tmp_path: Path) -> None:
    """The rank that looks at paces too; the store's server is in this process and is counted."""
    progress = Progress()
    progress.at(5, "accumulate")
    for step in range(WINDOW):
        progress.meter.computed(0.01)
        progress.meter.stepped(step, 1.0, 0.0)
    (store,) = tcp_stores(1)
    config = ResilienceConfig()
    heartbeat, timeout = config.heartbeat_seconds, config.timeout_seconds
    watchdog = Watchdog(progress, store, "1", tmp_path, 0, ranks, heartbeat, timeout, stragglers=Stragglers())
    watchdog.look()
    for rank in range(1, ranks):
        store.set(f"watchdog/1/{rank}", store.get("watchdog/1/0").decode())
    watchdog.look()
    began = time.process_time()
    for _ in range(LOOKS):
        watchdog.look()
    assert len(watchdog.beats.paces()) == ranks
    assert (time.process_time() - began) / LOOKS < SHARE * heartbeat
