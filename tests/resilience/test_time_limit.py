"""When time gets short, on a virtual clock; and what Slurm says of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from megatrain.resilience.stopping import StopAgreement, StopSignal
from megatrain.resilience.time_limit import TimeLimit, end_of_time, seconds_of


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limit(clock: Clock, seconds: float, save_seconds: Callable[[], float | None] = lambda: None) -> TimeLimit:
    return TimeLimit(time.time() + seconds, save_seconds, clock)


def stops_after(limit: TimeLimit, clock: Clock, step_seconds: float) -> float:
    """The seconds of training until it says so."""
    began = clock.now
    while True:
        clock.now += step_seconds
        if limit.is_short(steps_ahead=3):
            return clock.now - began


def test_it_leaves_what_stopping_takes() -> None:
    clock = Clock()
    # 1000 s, less 30 to spare, twice 60 or 100 for the save, and four steps of 2 s.
    assert stops_after(limit(clock, 1000), clock, 2) == pytest.approx(1000 - 30 - 120 - 8, abs=4)
    assert stops_after(limit(clock, 1000, lambda: 100), clock, 2) == pytest.approx(1000 - 30 - 200 - 8, abs=4)
    assert stops_after(limit(clock, 120), clock, 2) == pytest.approx(120 / 2, abs=4)


def test_it_reckons_with_a_step_as_long_as_the_longest_but_the_first() -> None:
    clock = Clock()
    one = limit(clock, 2000)
    for seconds, short in ((400, False), (2, False), (300, False), (2, False), (700, True)):
        clock.now += seconds
        assert one.is_short(3) == short, seconds
    assert clock.now - 1000 == 1404  # Less than 700 + 120 + 30 before the end.


def test_short_time_is_a_reason_to_stop() -> None:
    stop, clock = StopSignal(), Clock()
    agreement = StopAgreement(stop, None, "1", limit=limit(clock, 1000))
    assert agreement.poll(1) is None
    clock.now += 880
    assert agreement.poll(2) == "time limit at rank 0"


def test_what_ends_the_time() -> None:
    assert end_of_time(50.0, 100.0, {"SLURM_JOB_END_TIME": "120"}) == 150
    assert end_of_time(None, 100.0, {"SLURM_JOB_END_TIME": "120"}) == 120
    assert end_of_time(None, 100.0, {}) is None


def test_what_squeue_says() -> None:
    said = {
        "5:00\n": 300,
        "0:07": 7,
        "1:04:05": 3845,
        "2-01:04:05": 176645,
        "UNLIMITED": None,
        "INVALID": None,
        "": None,
    }
    assert {text: seconds_of(text) for text in said} == said
