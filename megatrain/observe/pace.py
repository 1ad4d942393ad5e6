"""How fast this rank is by itself, measured without slowing it; what is concluded of all ranks goes to the event log.

Design choices:
- Timed is one projection, gate and up of this rank's first MLP, in the first micro-batch of each step: a large matrix
  product that every rank computes alike, whatever its stage. It begins when its weights are there (the engine's hooks
  come first), so no wait for another rank is in it but tensor parallelism's.
- On a GPU two events around it are read when a later step begins, if they have passed: the host waits for nothing.
- Steps and waits for data come as records do, through a sink.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import torch
from torch import nn

from megatrain import device
from megatrain.observe.events import EventLog
from megatrain.observe.records import Record
from megatrain.resilience.progress import Progress
from megatrain.resilience.stragglers import PaceMeter, Stragglers

log = logging.getLogger(__name__)


class ComputeTimer:
    """Tells `meter` how long `module`'s forward takes, once a step.

    To be made when the engine is built: hooks run in the order in which they were registered.
    """

    def __init__(self, module: nn.Module, meter: PaceMeter, progress: Progress) -> None:
        self._meter = meter
        self._progress = progress
        self._timed_step = -1
        self._began: torch.Event | float | None = None
        self._under_way: deque[tuple[torch.Event, torch.Event]] = deque()
        module.register_forward_pre_hook(self._before)
        # Before the engine's, which free the weights.
        module.register_forward_hook(self._after, prepend=True)

    def _before(self, *_: object) -> None:
        place = self._progress.place
        if place.phase != "accumulate" or place.step == self._timed_step:
            return
        self._timed_step = place.step
        while self._under_way and self._under_way[0][1].query():
            began, ended = self._under_way.popleft()
            self._meter.computed(began.elapsed_time(ended) / 1000)
        self._began = device.event(timing=True) or time.perf_counter()

    def _after(self, *_: object) -> None:
        began, self._began = self._began, None
        if isinstance(began, float):
            self._meter.computed(time.perf_counter() - began)
        elif began is not None:
            ended = device.event(timing=True)
            assert ended is not None
            self._under_way.append((began, ended))


class PaceSink:
    """A sink of metrics, on every rank, that tells `meter` of each step; on rank 0 it writes `straggler` events.

    stragglers: what rank 0's watchdog fills. events: rank 0's.
    """

    def __init__(self, meter: PaceMeter, stragglers: Stragglers, events: EventLog | None) -> None:
        self.meter = meter
        self.stragglers = stragglers
        self.events = events

    def write(self, record: Record) -> None:
        step, whole, data_wait = (record.get(name) for name in ("step", "step_seconds", "data_wait_seconds"))
        if isinstance(step, int) and isinstance(whole, float) and isinstance(data_wait, float):
            self.meter.stepped(step, whole, data_wait)
        if self.events is None:
            return
        for each in self.stragglers.take():
            log.warning("%s", each)
            about = {"rank": each.rank, "host": each.host, "what": each.what}
            numbers = {"factor": round(each.factor, 3), "z_score": round(each.z_score, 1)}
            self.events.write("straggler", each.step, **about, **numbers)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """The log has other writers."""
