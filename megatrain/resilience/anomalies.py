"""Steps that must not count: what makes one, and what is done when they come again. No torch.

Design choices:
- The ladder: a step whose loss or gradient norm isn't finite, or is above its limit, is skipped; after several of them
  the run goes back to a checkpoint from before and passes over the samples since, the bad ones included (Chowdhery et
  al. 2022, PaLM, section 5.1); when it has done that often enough it ends.
- A limit is a ratio: in logarithms, so many deviations above the median of the last good steps. Median and median
  absolute deviation, which a spike that got through doesn't move.
- Whether to skip is decided on the device. The host brings limits, which it has from steps that have arrived for sure:
  those `lag` and more before. So it never waits, and all ranks, who read the same numbers, know the same at the same
  step: limits are equal, and all go back together.
- What is known is in every checkpoint: a continued run skips what an unbroken one would.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from megatrain.resilience_config import AnomaliesConfig

TO_SIGMA = 1.4826
"""Median absolute deviations of a normal distribution in one standard deviation."""
LEAST_DEVIATION = 0.01
"""Taken for the deviation of logarithms where it is less: a curve may be flatter for a while than it will be."""
TINY = 1e-30
"""What a value is at least: a loss or norm of 0 has no logarithm."""


@dataclass(frozen=True)
class Measured:
    """What the host learns of a step when its record arrives. last_sample: of its global batch."""

    step: int
    loss: float
    gradient_norm: float
    target_count: int
    skipped: bool
    last_sample: int


@dataclass(frozen=True)
class Limits:
    """Above which a step is skipped; inf: nothing is."""

    loss: float = math.inf
    gradient_norm: float = math.inf


@dataclass(frozen=True)
class Series:
    """Skipped steps that came close together. last_sample: the last one that they trained on."""

    steps: tuple[int, ...]
    last_sample: int
    reason: str


class AnomaliesState(TypedDict):
    """What a checkpoint keeps; JSON, with no value that isn't finite.

    good: step, loss, gradient norm. bad: step, last sample, reason. since: the first step of those that are alike.
    """

    good: list[tuple[int, float, float]]
    bad: list[tuple[int, int, str]]
    since: int
    rollbacks: int


def limit(values: Sequence[float], deviations: float) -> float:
    """The highest value that isn't a spike after `values`: so many deviations above their median, in logarithms."""
    logarithms = [math.log(max(value, TINY)) for value in values]
    median = statistics.median(logarithms)
    deviation = TO_SIGMA * statistics.median(abs(each - median) for each in logarithms)
    # A spread that no float holds is no limit.
    above = median + deviations * max(deviation, LEAST_DEVIATION)
    return math.exp(above) if above < 700 else math.inf


class Anomalies:
    """What is known of the steps so far, and what follows from it. Every rank has one and is told the same.

    rollbacks: how often the run has gone back.
    """

    def __init__(self, config: AnomaliesConfig, lag: int) -> None:
        """lag: how many steps later a record has arrived at the latest."""
        self.config = config
        self.lag = lag
        self.rollbacks = 0
        self._since = 1
        # What is too new to be looked at takes no place from what isn't.
        self._good: deque[tuple[int, float, float]] = deque(maxlen=config.window + lag)
        self._bad: deque[tuple[int, int, str]] = deque(maxlen=config.within + lag)

    def state(self) -> AnomaliesState:
        """To go on from, once all records have arrived."""
        return AnomaliesState(good=list(self._good), bad=list(self._bad), since=self._since, rollbacks=self.rollbacks)

    def restore(self, state: AnomaliesState | None) -> None:
        """Knows what it knew when it had `state` (None: nothing yet); that it has gone back is not forgotten."""
        state = state or AnomaliesState(good=[], bad=[], since=1, rollbacks=0)
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        self._since = state["since"]
        self._good.clear()
        self._good.extend((step, loss, norm) for step, loss, norm in state["good"])
        self._bad.clear()
        self._bad.extend((step, last, reason) for step, last, reason in state["bad"])

    def limits(self, steps_done: int) -> Limits:
        """Those of the step that follows `steps_done` steps; none before a window of good steps is known."""
        known = [each for each in self._good if self._since <= each[0] <= steps_done - self.lag]
        window = known[-self.config.window :]
        if not self.config.deviations or len(window) < self.config.window:
            return Limits()
        _, losses, norms = zip(*window, strict=True)
        return Limits(limit(losses, self.config.deviations), limit(norms, self.config.deviations))

    def learn(self, measured: Measured) -> str | None:
        """Takes what came of a step, in the order of steps. Why it was skipped, if it was."""
        if not measured.skipped:
            self._good.append((measured.step, measured.loss, measured.gradient_norm))
            return None
        if measured.target_count == 0:
            return "no targets"  # The data are so; nothing went wrong.
        reason = self._reason(measured)
        self._bad.append((measured.step, measured.last_sample, reason))
        return reason

    def _reason(self, measured: Measured) -> str:
        limits = self.limits(measured.step - 1)
        for name, value, most in (
            ("loss", measured.loss, limits.loss),
            ("gradient norm", measured.gradient_norm, limits.gradient_norm),
        ):
            if not math.isfinite(value):
                return f"{name} {value}"
            if value > most:
                return f"{name} {value:.4g} above {most:.4g}"
        # The device compares in its own precision.
        return f"gradient norm {measured.gradient_norm:.4g} at its limit"

    def series(self, steps_done: int) -> Series | None:
        """The skipped steps that ask to go back after `steps_done` steps, if there are enough of them."""
        known = [bad for bad in self._bad if bad[0] <= steps_done - self.lag]
        close = [bad for bad in known if bad[0] > known[-1][0] - self.config.within]
        if not self.config.repeats or len(close) < self.config.repeats:
            return None
        steps, samples, reasons = zip(*close, strict=True)
        return Series(steps, max(samples), reasons[-1])

    def begin_anew(self, step: int) -> None:
        """From this step on the batches are others: those before say nothing of what is to be expected."""
        self._since = step
