"""Stopping on request, or since time gets short: all ranks stop after the same step.

Design choices:
- A handler only sets a flag. Whatever runs, runs on; the trainer looks between steps.
- Stopping is agreed a fixed number of steps ahead, over the CPU store: the rank with the signal names a step that no
  other rank has reached, so every rank learns of it in time, and no step waits for the agreement.
- Where time gets short (time_limit.py) the rank that sees it proposes, as if it had a signal.
"""

from __future__ import annotations

import json
import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from megatrain.resilience.time_limit import TimeLimit

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A scheduler's end of time (Slurm's --signal too), and Ctrl-C."""


class StopSignal:
    """Whether this process was asked to stop. `name`: the first signal, or what else asks; None so far."""

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> None:
        """Handles SIGTERM, SIGUSR1 and SIGINT, from the main thread. A second call changes nothing.

        What came before while the signals were blocked, as the launcher starts its ranks, counts from here on.
        """
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name


class StopAgreement:
    """All ranks' agreement to stop.

    attempt: names this start of the run. A restart may meet the store of the start before it; its keys are others.
    steps_ahead: how many steps ahead of its own the rank with a signal puts the stop. Let no host be more than r steps
        ahead of another (a step needs gradients of all ranks, and the trainer bounds how many it queues: r = 2). When
        the rank with the signal proposes at step s, the others have polled step s + r at most; they see the proposal
        at s + r + 1 at the latest, which must not be past the stop. So steps_ahead >= r + 1.
    """

    def __init__(
        self,
        stop: StopSignal,
        store: Store | None,
        attempt: str,
        rank: int = 0,
        steps_ahead: int = 3,
        limit: TimeLimit | None = None,
    ) -> None:
        """store: None in a run of one process, which stops at once. limit: one rank has it, if there is one."""
        self.stop = stop
        self.limit = limit
        self.store = store
        self.rank = rank
        self.steps_ahead = steps_ahead
        self._key = f"stop/{attempt}"
        self._agreed: tuple[int, str] | None = None

    def poll(self, step: int) -> str | None:
        """The reason to stop now, or None. Every rank calls it once a step, with the steps done so far.

        Doesn't block on other ranks. Raises RuntimeError where the agreed step is past: this rank ran further ahead
        than steps_ahead allows, and would save another step than the others.
        """
        if self.limit is not None and self.limit.is_short(self.steps_ahead) and self.stop.name is None:
            self.stop.name = "time limit"
        if self.store is None:
            return self._reason() if self.stop.name is not None else None
        if self._agreed is None:
            self._agreed = self._look(self.store, step)
        if self._agreed is None:
            return None
        stop_at, reason = self._agreed
        if step > stop_at:
            raise RuntimeError(f"at step {step} this rank sees that all stop at {stop_at}: it ran too far ahead")
        return reason if step == stop_at else None

    def _look(self, store: Store, step: int) -> tuple[int, str] | None:
        """What is agreed, (step, reason): another rank's proposal, or this one's if it has a signal and is first."""
        if self.stop.name is not None:
            proposal = json.dumps([step + self.steps_ahead, self._reason()])
            raw = store.compare_set(self._key, "", proposal)
        elif store.check([self._key]):
            raw = store.get(self._key)
        else:
            return None
        stop_at, reason = json.loads(raw)
        return stop_at, reason

    def _reason(self) -> str:
        return f"{self.stop.name} at rank {self.rank}"
