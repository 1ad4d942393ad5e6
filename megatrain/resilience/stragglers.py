"""Which rank makes the others wait: what a rank measures of itself, and what is concluded from all ranks' measures.

Design choices:
- In synchronous training every rank's step takes as long as the slowest's, so whole steps say nothing. Compared is what
  a rank does alone: the same piece of computing once a step (observe/pace.py), and how long it waited for its data.
- A rank sends the medians of its last WINDOW steps with its heartbeats: no message of its own, and no single hiccup
  counts.
- Robust z-scores over ranks: the distance to the median, over the median absolute deviation (times 1.4826, which
  makes it a standard deviation where the noise is normal: Rousseeuw and Croux 1993), which a few slow ranks can't move.
- Median and deviation are those of all but the slowest: among few ranks its own time would decide what is usual.
- The deviation is taken to be LEAST_DEVIATION to MOST_DEVIATION of the median: below 1.15 times the median nobody is
  named, above 1.2 times everybody, however far ranks are apart.
- Only what two windows say that share no step is said.
- Not seen: a slow link (`megatrain doctor` measures it), a host that launches kernels slowly, and slow ranks where most
  are slow. Ranks of a tensor-parallel group wait for each other inside the piece: all are named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from statistics import median

WINDOW = 16
"""Steps that a rank's medians are over."""
Z_SCORE = 5.0
"""A rank further than so many deviations above the median is slow."""
LEAST_DEVIATION, MOST_DEVIATION = 0.03, 0.04
"""Of the median: no smaller deviation is believed, and no larger one. How far few ranks are apart is mostly chance."""
NORMAL = 1.4826

COMPUTING, READING = "computing", "reading data"


@dataclass(frozen=True)
class Pace:
    """Medians over a rank's last WINDOW steps, the last of which is `step`.

    compute: seconds of the timed piece of computing. data_wait: seconds until a step had its data. whole: of a step.
    """

    step: int
    compute: float
    data_wait: float
    whole: float


class PaceMeter:
    """Collects what one rank measures. The main thread tells it, the watchdog's reads `pace`."""

    def __init__(self) -> None:
        self._step = 0
        self._compute: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def computed(self, seconds: float) -> None:
        """The piece of computing took so long in a step."""
        self._compute.append(seconds)

    def stepped(self, step: int, whole: float, data_wait: float) -> None:
        """A step is over; all in seconds."""
        self._steps.append((whole, data_wait))
        self._step = step

    def pace(self) -> Pace | None:
        """None until there is a whole window."""
        # Copies: the main thread goes on adding.
        compute, steps = list(self._compute), list(self._steps)
        if min(len(compute), len(steps)) < WINDOW:
            return None
        wholes, waits = zip(*steps, strict=True)
        return Pace(self._step, *(round(median(each), 6) for each in (compute, waits, wholes)))


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others.

    what: COMPUTING or READING. factor: its seconds over the median rank's. z_score: robust. step: its last.
    """

    rank: int
    host: str
    what: str
    factor: float
    z_score: float
    step: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}) takes {self.factor:.2f} times as long as the others {self.what}"


class Stragglers:
    """Judges the paces of all ranks each time they are looked at; names a rank once until it is well again.

    look is the watchdog's to call, take the main thread's.
    """

    def __init__(self) -> None:
        self._suspected: dict[tuple[int, str], int] = {}
        self._named: set[tuple[int, str]] = set()
        self._found: SimpleQueue[Straggler] = SimpleQueue()

    def look(self, paces: Mapping[int, tuple[str, Pace]]) -> None:
        """paces: by rank, its host and its pace."""
        slow = {(each.rank, each.what): each for each in judge(paces)}
        self._suspected = {key: self._suspected.get(key, each.step) for key, each in slow.items()}
        self._named &= slow.keys()
        for key, each in slow.items():
            if key not in self._named and each.step - self._suspected[key] >= WINDOW:
                self._named.add(key)
                self._found.put(each)

    def take(self) -> list[Straggler]:
        """Who was named since the last call."""
        found = []
        while True:
            try:
                found.append(self._found.get_nowait())
            except Empty:
                return found


def judge(paces: Mapping[int, tuple[str, Pace]]) -> list[Straggler]:
    """Who is slow by these paces alone. paces: by rank, its host and its pace; fewer than two say nothing."""
    if len(paces) < 2:
        return []
    # What of a step isn't the longest wait for data is there without it: added to each wait it is the step that would
    # be if all waited like this rank.
    rest = median(pace.whole for _, pace in paces.values()) - max(pace.data_wait for _, pace in paces.values())
    seconds = {
        COMPUTING: {rank: pace.compute for rank, (_, pace) in paces.items()},
        READING: {rank: max(rest, 0.0) + pace.data_wait for rank, (_, pace) in paces.items()},
    }
    found = []
    for what, each in seconds.items():
        others = sorted(each.values())[:-1]
        usual = median(others)
        spread = NORMAL * median(abs(value - usual) for value in others)
        deviation = min(max(spread, LEAST_DEVIATION * usual), MOST_DEVIATION * usual)
        for rank, value in each.items():
            if value - usual > Z_SCORE * deviation:
                host, pace = paces[rank]
                found.append(Straggler(rank, host, what, value / usual, (value - usual) / deviation, pace.step))
    return found
