"""Where a rank's main thread is, for the watchdog's thread to read.

Design choices:
- Moving on is one assignment of a new object: no lock, no clock, no host-device synchronisation. Whoever looks compares
  identity, so the same place told again counts as progress too.
- Places have an order that is the same on every rank, so that of ranks that all stand still the one that is behind can
  be named.
- With an asynchronous device this is the place of the host, which runs ahead: by as many steps as metrics may lag. A
  device that hangs stops its host at the next wait, which is in "metrics" unless a queue is full before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatrain.resilience.stragglers import PaceMeter

T = TypeVar("T")

PHASES = {
    "data": "reading data for step",
    "accumulate": "computing step",
    "apply": "updating weights in step",
    "metrics": "waiting for the metrics of step",
    "evaluate": "evaluating after step",
    "save": "saving step",
    "go_back": "going back to a checkpoint after step",
}
"""The phases of a step, in order, and how a sentence says them."""


@dataclass(frozen=True)
class Place:
    """A phase of a step. part: how far within the phase, counted alike on every rank."""

    step: int
    phase: str
    part: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Compares places: the smaller is behind."""
        return self.step, list(PHASES).index(self.phase), self.part

    @property
    def steps_done(self) -> int:
        """Optimizer steps that are complete here."""
        return self.step - (self.phase in ("data", "accumulate", "apply"))

    def __str__(self) -> str:
        return f"{PHASES[self.phase]} {self.step}"


class Progress:
    """Told by the main thread where it is, and how fast; `place` and `meter` are read by another thread."""

    def __init__(self) -> None:
        self.place = Place(0, "data")
        self.meter = PaceMeter()

    def at(self, step: int, phase: str) -> None:
        """The main thread begins a phase of PHASES."""
        self.place = Place(step, phase)

    def parts(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each one a new part of the phase. Every rank must take as many."""
        for item in items:
            self._next_part()
            yield item

    def pieces(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each one progress within the same part: ranks may have different numbers of them."""
        for item in items:
            self.goes_on()
            yield item

    def goes_on(self) -> None:
        """Progress within the same part."""
        self.place = Place(self.place.step, self.place.phase, self.place.part)

    def meeting(self, agree: Callable[[str | None], str | None]) -> Callable[[str | None], str | None]:
        """`agree` with a part for the waiting and one for what comes after: who waits is ahead of who works."""

        def meet(failure: str | None) -> str | None:
            self._next_part()
            answer = agree(failure)
            self._next_part()
            return answer

        return meet

    def follow(self, other: Progress, over: Callable[[float], bool]) -> None:
        """Waits until `over(seconds)`, which waits that long at most, is true; what `other` says counts as said here.

        other: another thread's, in the same phase.
        """
        seen: Place | None = None
        while not over(0.2):
            if other.place is not seen:
                seen = other.place
                self.place = Place(self.place.step, self.place.phase, seen.part)

    def _next_part(self) -> None:
        place = self.place
        self.place = Place(place.step, place.phase, place.part + 1)
