"""A signal to one rank stops all after the same step, however the ranks run ahead of each other."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from megatrain.resilience.stopping import SIGNALS, StopAgreement, StopSignal
from tests.resilience.stores import tcp_stores

RANKS = 3
RUN_AHEAD = 2


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the handlers back that were there."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handlers")
def test_a_signal_only_sets_a_flag(number: signal.Signals) -> None:
    stop = StopSignal()
    stop.install()
    stop.install()
    assert stop.name is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == number.name


def test_one_process_stops_at_once() -> None:
    stop = StopSignal()
    agreement = StopAgreement(stop, None, "1")
    assert agreement.poll(4) is None
    stop.name = "SIGTERM"
    assert agreement.poll(5) == "SIGTERM at rank 0"


class Steps:
    """Lets no rank begin a step before all others have done the step RUN_AHEAD before it, as training does."""

    def __init__(self) -> None:
        self.done = [0] * RANKS
        self.changed = threading.Condition()

    def wait(self, step: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: min(self.done) >= step - RUN_AHEAD, timeout=20)

    def finish(self, rank: int, step: int) -> None:
        with self.changed:
            self.done[rank] = step
            self.changed.notify_all()


@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_stop_after_the_same_step(seed: int) -> None:
    stores, steps, chosen = tcp_stores(RANKS), Steps(), Random(seed)
    asked = {rank: chosen.randrange(3, 12) for rank in chosen.sample(range(RANKS), chosen.choice([1, 1, 2, 3]))}

    def rank_main(rank: int) -> tuple[int, str]:
        stop, pace = StopSignal(), Random(seed * RANKS + rank)
        agreement = StopAgreement(stop, stores[rank], "attempt 1", rank, steps_ahead=RUN_AHEAD + 1)
        for step in range(1, 100):
            steps.wait(step)
            time.sleep(pace.choice([0, 0, 0.002]))
            steps.finish(rank, step)
            if asked.get(rank) == step:
                stop.name = "SIGUSR1"
            reason = agreement.poll(step)
            if reason is not None:
                return step, reason
        raise AssertionError("nothing stopped this rank")

    with ThreadPoolExecutor(RANKS) as ranks:
        ends = list(ranks.map(rank_main, range(RANKS)))
    assert ends[0] == ends[1] == ends[2]
    step, reason = ends[0]
    assert reason in {f"SIGUSR1 at rank {rank}" for rank in asked}
    assert step in {first + RUN_AHEAD + 1 for first in asked.values()}


def test_a_rank_too_far_ahead_is_told() -> None:
    ours, theirs = tcp_stores(2)
    stop = StopSignal()
    stop.name = "SIGTERM"
    assert StopAgreement(stop, ours, "1", steps_ahead=1).poll(10) is None
    with pytest.raises(RuntimeError, match="at step 12 this rank sees that all stop at 11"):
        StopAgreement(StopSignal(), theirs, "1", 1, steps_ahead=1).poll(12)


def test_the_next_start_on_the_same_store_does_not_stop() -> None:
    (store,) = tcp_stores(1)
    stop = StopSignal()
    stop.name = "SIGTERM"
    StopAgreement(stop, store, "attempt 1").poll(10)
    assert StopAgreement(StopSignal(), store, "attempt 2").poll(13) is None
    assert StopAgreement(StopSignal(), store, "attempt 1").poll(13) == "SIGTERM at rank 0"
