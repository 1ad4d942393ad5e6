"""Limits, series of skipped steps, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.resilience.anomalies import LEAST_DEVIATION, Anomalies, Limits, Measured, Series, limit
from megatrain.resilience_config import AnomaliesConfig

LAG = 2
SMALL = AnomaliesConfig(window=4, deviations=10.0, repeats=3, within=6, rollbacks=2)
positive = st.floats(1e-6, 1e6)


def good(step: int, loss: float = 2.0, norm: float = 1.0) -> Measured:
    return Measured(step, loss, norm, target_count=64, skipped=False, last_sample=8 * step - 1)


def bad(step: int, loss: float = 2.0, norm: float = math.nan, target_count: int = 64) -> Measured:
    return Measured(step, loss, norm, target_count, skipped=True, last_sample=8 * step - 1)


@given(st.lists(positive, min_size=1, max_size=40), st.floats(1.0, 20.0))
def test_a_limit_is_a_ratio_above_the_median(values: list[float], deviations: float) -> None:
    found = limit(values, deviations)
    assert found >= statistics.median_low(values) * math.exp(deviations * LEAST_DEVIATION) * (1 - 1e-9)
    assert limit([8 * value for value in values], deviations) == pytest.approx(8 * found, rel=1e-9)


@given(st.lists(st.floats(1.0, 1.1), min_size=9, max_size=40), st.floats(0, 1e300), st.data())
def test_a_few_spikes_do_not_move_a_limit_much(values: list[float], spike: float, data: st.DataObject) -> None:
    """As many as a quarter: median and deviation stay within those of the others."""
    spiked = list(values)
    for place in data.draw(st.sets(st.integers(0, len(values) - 1), max_size=len(values) // 4)):
        spiked[place] = spike
    assert 1.0 < limit(spiked, 3.0) < 1.1 * math.exp(3 * 1.4826 * math.log(1.1) + 1e-9)


@pytest.mark.parametrize(("values", "expected"), [([0.0] * 5, 0.0), ([1e-300, 1e300], math.inf)])
def test_a_limit_of_any_values_is_a_number(values: list[float], expected: float) -> None:
    assert limit(values, 10.0) == pytest.approx(expected, abs=1e-20)


def test_limits_know_a_window_of_good_steps_no_newer_than_the_lag() -> None:
    anomalies = Anomalies(SMALL, LAG)
    seen = []
    for step in range(1, 9):
        seen.append(anomalies.limits(step - 1))
        anomalies.learn(good(step, loss=100.0 if step > 6 else 2.0))
    # The first limits are of steps 1 to 4, once step 6 is over.
    assert seen[:6] == [Limits()] * 6
    assert seen[6] == seen[7] == Limits(limit([2.0] * 4, 10.0), limit([1.0] * 4, 10.0))


@given(st.lists(st.booleans(), min_size=12, max_size=60), st.lists(st.integers(0, LAG), min_size=60, max_size=60))
def test_what_follows_does_not_depend_on_when_records_arrive(skipped: list[bool], late: list[int]) -> None:
    """One rank learns of a step at once, the other up to LAG steps later."""
    prompt, slow = Anomalies(SMALL, LAG), Anomalies(SMALL, LAG)
    told = 0
    for step, (skip, lateness) in enumerate(zip(skipped, late, strict=False), 1):
        assert prompt.limits(step - 1) == slow.limits(step - 1)
        prompt.learn(bad(step) if skip else good(step, loss=2 + step / 7))
        for arrived in range(told + 1, step - lateness + 1):
            slow.learn(bad(arrived) if skipped[arrived - 1] else good(arrived, loss=2 + arrived / 7))
            told = arrived
        assert prompt.series(step) == slow.series(step)


@given(st.lists(st.booleans(), min_size=30, max_size=30), st.integers(0, 30))
def test_a_continued_run_knows_what_an_unbroken_one_does(skipped: list[bool], stop: int) -> None:
    whole, first, then = Anomalies(SMALL, LAG), Anomalies(SMALL, LAG), Anomalies(SMALL, LAG)
    for step, skip in enumerate(skipped, 1):
        measured = bad(step) if skip else good(step, loss=2 + step / 7)
        if step == 5:
            whole.begin_anew(step)
            (first if step <= stop else then).begin_anew(step)
        whole.learn(measured)
        (first if step <= stop else then).learn(measured)
        if step == stop:
            then.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        if step > stop > 0:
            assert then.limits(step) == whole.limits(step)
            assert then.series(step) == whole.series(step)


def test_a_step_without_targets_is_neither_good_nor_bad() -> None:
    anomalies = Anomalies(SMALL, lag=0)
    for step in range(1, 6):
        assert anomalies.learn(bad(step, loss=0.0, norm=0.0, target_count=0)) == "no targets"
    assert anomalies.series(5) is None
    assert anomalies.state()["good"] == []


def test_each_reason_is_said() -> None:
    anomalies = Anomalies(SMALL, lag=0)
    for step in range(1, 5):
        anomalies.learn(good(step))
    assert anomalies.learn(bad(5, loss=math.inf)) == "loss inf"
    assert anomalies.learn(bad(6)) == "gradient norm nan"
    assert anomalies.learn(bad(7, loss=4.0, norm=4.0)) == "loss 4 above 2.21"
    assert anomalies.learn(bad(8, norm=4.0)) == "gradient norm 4 above 1.105"


def test_skipped_steps_that_are_close_are_a_series() -> None:
    anomalies = Anomalies(SMALL, LAG)
    for step in range(1, 21):
        anomalies.learn(bad(step) if step in (2, 9, 12, 14) else good(step))
        if step < 16:  # Step 14 counts two steps later: then it is known on all ranks.
            assert anomalies.series(step) is None
    assert anomalies.series(16) == Series((9, 12, 14), last_sample=111, reason="gradient norm nan")


def test_other_batches_begin_anew() -> None:
    anomalies = Anomalies(SMALL, lag=0)
    for step in range(1, 9):
        anomalies.learn(good(step))
    assert anomalies.limits(8) != Limits()
    anomalies.begin_anew(9)
    assert anomalies.limits(8) == Limits()
    for step in range(9, 13):
        anomalies.learn(good(step, loss=5.0))
    assert anomalies.limits(12).loss == limit([5.0] * 4, 10.0)


def test_going_back_is_not_forgotten_by_going_back() -> None:
    anomalies = Anomalies(SMALL, lag=0)
    before = anomalies.state()
    anomalies.rollbacks += 1
    anomalies.restore(before)
    assert anomalies.rollbacks == 1
    again = Anomalies(SMALL, lag=0)
    again.restore(anomalies.state())
    assert again.rollbacks == 1


@pytest.mark.parametrize("off", [AnomaliesConfig(window=4, deviations=0.0), AnomaliesConfig(window=4, repeats=0)])
def test_0_turns_a_part_off(off: AnomaliesConfig) -> None:
    anomalies = Anomalies(off, lag=0)
    for step in range(1, 9):
        anomalies.learn(good(step))
    for step in range(9, 17):
        anomalies.learn(bad(step))
    assert (anomalies.limits(16) == Limits()) == (off.deviations == 0)
    assert (anomalies.series(16) is None) == (off.repeats == 0)


@dataclass
class Curves:
    """Losses and gradient norms as clean runs have them: a fall that flattens, a norm whose noise has a long tail."""

    chance: Random
    loss_noise: float
    norm_noise: float

    def at(self, step: int) -> tuple[float, float]:
        fall = 2.0 + 8.0 * math.exp(-step / 150) + 3.0 * step**-0.3
        # Student's t with 5 degrees of freedom: rare batches are far out.
        tail = self.chance.gauss() / math.sqrt(self.chance.gammavariate(2.5, 2) / 5)
        norm = (0.3 + 3.0 * math.exp(-step / 100)) * math.exp(self.norm_noise * tail)
        return fall * math.exp(self.chance.gauss(0, self.loss_noise)), norm


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("loss_noise", "norm_noise"), [(0.003, 0.1), (0.03, 0.3)])
def test_clean_curves_give_no_alarm_and_spikes_do(seed: int, loss_noise: float, norm_noise: float) -> None:
    """2,000 steps with the defaults; then a loss half as high again, and a norm that is a hundred times the usual."""
    curves, anomalies = Curves(Random(seed), loss_noise, norm_noise), Anomalies(AnomaliesConfig(), LAG)
    for step in range(1, 2001):
        limits = anomalies.limits(step - 1)
        loss, norm = curves.at(step)
        assert loss <= limits.loss
        assert norm <= limits.gradient_norm
        anomalies.learn(good(step, loss, norm))
    limits, (loss, norm) = anomalies.limits(2000), curves.at(2001)
    assert 1.5 * loss > limits.loss
    assert 100 * norm > limits.gradient_norm
