"""Who is named slow, and how soon, on a clock of the test; and that nobody is in a run where nobody was.

recorded_paces.csv.gz: 2,000 steps of a run of four ranks (fsdp over gloo, two cores that other work kept busy), a row
for each rank and step: rank, step, microseconds of the piece of computing, of the wait for data, of the whole step.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.resilience.stragglers import COMPUTING, READING, WINDOW, Pace, PaceMeter, Straggler, Stragglers, judge

RECORDED = Path(__file__).with_name("recorded_paces.csv.gz")
WITHIN = 50
"""Steps in which a slow rank has to be named."""
BEAT = 5
"""Steps between two looks: the default heartbeat at steps of a second."""

HICCUPS = 0.05

Steps = Iterator[dict[int, tuple[float, float, float]]]
"""For each step and rank: seconds of computing, of waiting for data, of the whole step."""


def recorded() -> Steps:
    rows: dict[int, dict[int, tuple[float, float, float]]] = {}
    for line in gzip.decompress(RECORDED.read_bytes()).decode().splitlines():
        rank, step, *micros = map(int, line.split(","))
        compute, wait, whole = (number / 1e6 for number in micros)
        rows.setdefault(step, {})[rank] = compute, wait, whole
    return iter([rows[step] for step in sorted(rows)])


def drawn(seed: int, ranks: int, steps: int, noise: float) -> Steps:
    """Ranks alike, each number with noise of its own; one of twenty is a hiccup of up to five times as long."""
    draw = random.Random(seed)

    def compute() -> float:
        return 0.01 * draw.lognormvariate(0, noise) * (draw.uniform(1, 5) if draw.random() < HICCUPS else 1)

    for _ in range(steps):
        yield {rank: (compute(), 0.001 * draw.random(), 1.0) for rank in range(ranks)}


def named(steps: Steps, slow: dict[int, tuple[float, float]], after: int = 0) -> list[tuple[int, Straggler]]:
    """Who is named after how many steps. slow: after `after` steps, how many times as long these ranks compute, and
    how much of a step longer they wait for data; everyone's step takes as long as the slowest's."""
    meters: dict[int, PaceMeter] = {}
    stragglers, found = Stragglers(), []
    for step, numbers in enumerate(steps, 1):
        extra = max((wait for _, wait in slow.values()), default=0.0) if step > after else 0.0
        for rank, (compute, wait, whole) in numbers.items():
            times, wait_share = slow.get(rank, (1.0, 0.0)) if step > after else (1.0, 0.0)
            meter = meters.setdefault(rank, PaceMeter())
            meter.computed(compute * times)
            meter.stepped(step, whole * (1 + extra), wait + whole * wait_share)
        if step % BEAT == 0:
            paces = {rank: meter.pace() for rank, meter in meters.items()}
            stragglers.look({rank: (f"node-{rank}", pace) for rank, pace in paces.items() if pace})
            found += [(step, each) for each in stragglers.take()]
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 24), st.floats(0, 0.06), st.data())
def test_a_rank_that_computes_slower_is_named_in_time(seed: int, ranks: int, noise: float, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, ranks - 1))
    found = named(drawn(seed, ranks, 200, noise), {slow: (1.3, 0.0)}, after=100)
    assert [(each.rank, each.host, each.what) for _, each in found] == [(slow, f"node-{slow}", COMPUTING)]
    ((step, straggler),) = found
    assert 100 < step <= 100 + WITHIN
    assert 1.15 < straggler.factor < 1.5


@pytest.mark.parametrize("ranks", range(3, 9))
def test_few_ranks_that_are_far_apart_hide_nobody(ranks: int) -> None:
    """Of three, whose median is one rank's own, every fourth was named too late while the slow one counted."""
    for seed in range(20):
        found = named(drawn(seed, ranks, 150, 0.06), {seed % ranks: (1.3, 0.0)}, after=100)
        assert [each.rank for _, each in found] == [seed % ranks]
        assert 100 < found[0][0] <= 100 + WITHIN


@pytest.mark.parametrize("slow", range(4))
def test_in_a_recorded_run_it_is_too(slow: int) -> None:
    found = named(recorded(), {slow: (1.3, 0.0)}, after=500)
    assert {(each.rank, each.what) for _, each in found} == {(slow, COMPUTING)}
    assert 500 < found[0][0] <= 500 + WITHIN


def test_a_rank_that_reads_slower_is_named_in_time() -> None:
    found = named(recorded(), {2: (1.0, 0.3)}, after=500)
    assert {(each.rank, each.what) for _, each in found} == {(2, READING)}
    assert 500 < found[0][0] <= 500 + WITHIN
    assert 1.2 < found[0][1].factor < 1.4


def test_nobody_is_named_in_a_recorded_run_without_a_slow_rank() -> None:
    assert len(list(recorded())) == 2000
    assert named(recorded(), {}) == []


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 64))
def test_nobody_is_named_among_ranks_alike(seed: int, ranks: int) -> None:
    assert named(drawn(seed, ranks, 400, noise=0.1), {}) == []


@pytest.mark.long
@pytest.mark.parametrize("ranks", [3, 4, 8, 64])
def test_nobody_is_named_among_them_for_long(ranks: int) -> None:
    assert named(drawn(0, ranks, 10_000, noise=0.1), {}) == []


def test_two_slow_ranks_of_eight_are_both_named() -> None:
    found = named(drawn(0, 8, 60, 0.02), {1: (1.3, 0.0), 6: (1.6, 0.0)})
    assert sorted(each.rank for _, each in found) == [1, 6]


def test_a_hiccup_of_a_few_steps_is_no_slowness() -> None:
    hiccup = [*drawn(1, 4, 20, 0.02)]
    for numbers in hiccup[8:14]:
        compute, *rest = numbers[3]
        numbers[3] = (20 * compute, *rest)  # type: ignore[assignment]
    assert named(iter([*hiccup, *drawn(2, 4, 60, 0.02)]), {}) == []


def test_a_rank_is_named_again_only_after_it_was_well() -> None:
    stragglers = Stragglers()

    def look(step: int, factor: float) -> list[int]:
        paces = {rank: Pace(step, 0.01 * (factor if rank == 1 else 1), 0.0, 1.0) for rank in range(3)}
        stragglers.look({rank: ("node", pace) for rank, pace in paces.items()})
        return [each.rank for each in stragglers.take()]

    slow = [look(step, 1.3) for step in range(0, 100, WINDOW)]
    assert slow == [[], [1], [], [], [], [], []]
    assert [look(100, 1.0), look(101, 1.3), look(101 + WINDOW, 1.3)] == [[], [], [1]]


def test_the_sentence_names_rank_host_and_factor() -> None:
    (found,) = judge({0: ("a", Pace(9, 1.0, 0, 2)), 1: ("b", Pace(9, 1.0, 0, 2)), 2: ("c", Pace(9, 1.5, 0, 2))})
    assert str(found) == "rank 2 (c) takes 1.50 times as long as the others computing"
    assert found.z_score == pytest.approx(0.5 / 0.03)


def test_one_rank_alone_is_not_slow_and_a_meter_needs_a_window() -> None:
    meter = PaceMeter()
    for step in range(1, WINDOW + 1):
        assert meter.pace() is None
        meter.computed(0.25)
        meter.stepped(step, 1.0, 0.125)
    assert meter.pace() == Pace(WINDOW, 0.25, 0.125, 1.0)
    assert judge({0: ("a", Pace(1, 1.0, 0.0, 1.0))}) == []
