"""What ranks say of themselves with each beat, and what one rank concludes from the beats of all.

Design choices:
- Ages are measured by who looks, from when it saw a beat change: clocks of different hosts are never compared.
- A rank is silent (process dead or stopped, node gone) or it stands still (its thread beats, its main thread doesn't
  move). When one stands still, soon all do, since they wait for it in a collective; named is who is behind. Silence
  explains a standstill, so it is looked for first.
- Places say which phase of which step; what of the collectives of a phase is open the flight recorders say, which are
  asked once a rank has stood still for half of the timeout (collectives.py). Where they name nobody, places do, and
  where no rank is behind that is what is said.
- A sentence begins with ranks and their hosts only where it blames them: launch/slurm/pretrain.sbatch leaves out nodes
  by that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil

from megatrain.resilience.collectives import Explanation, GroupRecord, Stand, explain
from megatrain.resilience.progress import Place
from megatrain.resilience.stragglers import Pace

FIRST_STEP = 3
"""How many timeouts the first step of a start may take: kernels are compiled, communicators made, cold files read."""
SILENT_BEATS = 3
"""A rank that misses so many beats is the cause where communication has failed already."""
CAUSES = {"data": "storage", "save": "storage", "go_back": "storage"}
"""What a rank is likely to hang in, by its phase, where it isn't in a collective."""
CAUSE = "the device, or code that doesn't return"
"""The same in the other phases."""
NAMED = 8
"""Ranks that a sentence names before it says how many more."""


@dataclass(frozen=True)
class Beat:
    """A sign of life. launcher: the process that started this one. standing: seconds at `place`. leaving: the last.

    pace: None until there is one. records: of the flight recorder, where it was asked and has answered.
    """

    number: int
    host: str
    launcher: int
    pid: int
    place: Place
    standing: float
    leaving: bool = False
    pace: Pace | None = None
    records: tuple[GroupRecord, ...] = ()

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(raw: bytes) -> Beat:
        fields = json.loads(raw)
        place, pace, records = fields.pop("place"), fields.pop("pace"), fields.pop("records")
        return Beat(
            **fields,
            place=Place(**place),
            pace=pace and Pace(**pace),
            records=tuple(GroupRecord.decode(each) for each in records),
        )


class Beats:
    """The last beat of every rank, and since when it is the last. Times are seconds since the one who looks began.

    home: host and launcher of the rank that looks. heartbeat, timeout: seconds. first_step: of this start.
    """

    def __init__(
        self, world_size: int, home: tuple[str, int], heartbeat: float, timeout: float, first_step: int
    ) -> None:
        self.world_size = world_size
        self.home = home
        self.heartbeat = heartbeat
        self.timeout = timeout
        self.first_step = first_step
        self.last: dict[int, Beat] = {}
        self._seen: dict[int, float] = {}

    def take(self, beats: Mapping[int, bytes], now: float) -> None:
        """Notes what the store holds now."""
        for rank, raw in beats.items():
            beat = Beat.decode(raw)
            if rank not in self.last or beat.number != self.last[rank].number:
                self.last[rank], self._seen[rank] = beat, now

    def verdict(self, now: float, communication_failed: bool) -> str | None:
        """The sentence that ends the run, or None while there is no reason to."""
        watched = [rank for rank in range(self.world_size) if rank not in self.last or not self.last[rank].leaving]
        if communication_failed:
            silent = [rank for rank in watched if self._silence(rank, now) > SILENT_BEATS * self.heartbeat]
            return self._name_silent(silent, now) if silent else None
        if not any(self._is_late(rank, now) for rank in watched):
            return None
        silent = [rank for rank in watched if self._is_silent(rank, now)]
        return self._name_silent(silent, now) if silent else self._explain(watched)

    def stalled(self) -> bool:
        """Whether a rank has stood still for so long that flight recorders are asked."""
        return any(beat.standing > self.timeout / 2 for beat in self.last.values())

    def paces(self) -> dict[int, tuple[str, Pace]]:
        """The pace of each rank that has told one, after its host."""
        return {rank: (beat.host, beat.pace) for rank, beat in self.last.items() if beat.pace is not None}

    def gone(self) -> str | None:
        """The sentence for ranks of the same launcher whose process has ended without a word."""
        dead = [rank for rank in self._siblings() if not psutil.pid_exists(self.last[rank].pid)]
        return f"{self._names(dead)} died, last seen {self.last[dead[0]].place}" if dead else None

    def silent_siblings(self, now: float) -> list[int]:
        """The process ids of ranks of the same launcher that gave no sign of life for long."""
        return [self.last[rank].pid for rank in self._siblings() if self._is_silent(rank, now)]

    def _siblings(self) -> list[int]:
        return [r for r, beat in self.last.items() if (beat.host, beat.launcher) == self.home and not beat.leaving]

    def _silence(self, rank: int, now: float) -> float:
        return now - self._seen.get(rank, 0.0)

    def _is_silent(self, rank: int, now: float) -> bool:
        """Half the timeout: a standstill is seen up to a beat sooner than the silence that is its cause."""
        return self._silence(rank, now) > self.timeout / 2

    def _is_late(self, rank: int, now: float) -> bool:
        first = FIRST_STEP * self.timeout
        if rank not in self.last:
            return self._silence(rank, now) > first
        beat = self.last[rank]
        patience = first if beat.place.step <= self.first_step else self.timeout
        return self._silence(rank, now) > self.timeout or beat.standing > patience

    def _name_silent(self, ranks: Sequence[int], now: float) -> str:
        seen = [rank for rank in ranks if rank in self.last]
        last = f"last seen {self.last[seen[0]].place}" if seen else "and never began to train"
        seconds = max(self._silence(rank, now) for rank in ranks)
        return (
            f"{self._names(ranks)} gave no sign of life for {seconds:.0f} s, {last}: "
            f"process or node dead, stopped or cut off"
        )

    def _explain(self, watched: Sequence[int]) -> str:
        """What hangs, as the flight recorders tell it or, where they tell nothing, the places."""
        found = explain({rank: self.last[rank].records for rank in watched if self.last[rank].records})
        if found is None:
            return self._name_behind(watched)
        if found.absent:
            return self._name_hung(self._behind(found.absent), watched, found.stands[0])
        return self._name_waiting(found)

    def _behind(self, ranks: Sequence[int]) -> list[int]:
        """Those of `ranks` that are at the least place."""
        least = min(self.last[rank].place.order for rank in ranks)
        return [rank for rank in ranks if self.last[rank].place.order == least]

    def _name_behind(self, watched: Sequence[int]) -> str:
        """By places alone."""
        behind = self._behind(watched)
        if len(behind) == len(watched) > 1:
            place, seconds = self.last[behind[0]].place, self._standing(behind)
            sentence = f"all {len(watched)} ranks have been {place} for {seconds}, none is behind the others"
            mute = [rank for rank in watched if not self.last[rank].records]
            if 0 < len(mute) < len(watched):
                sentence += f"; no answer from the flight recorder of {self._names(mute)}, likely a device that hangs"
            return sentence
        return self._name_hung(behind, watched)

    def _name_hung(self, ranks: Sequence[int], watched: Sequence[int], missed: Stand | None = None) -> str:
        """`ranks`, all at one place, are to blame. missed: what the others wait in."""
        place = self.last[ranks[0]].place
        ahead = max((self.last[rank].place for rank in watched), key=lambda each: each.order)
        sentence = f"{self._names(ranks)} hung {place} for {self._standing(ranks)}"
        if len(ranks) < len(watched):
            sentence += "; the others waited"
            sentence += f", up to {ahead}" * (ahead.order > place.order)
            sentence += f", in {self._name_operation(missed)}" if missed else ""
        return f"{sentence}; likely {CAUSES.get(place.phase, CAUSE)}"

    def _name_waiting(self, found: Explanation) -> str:
        """Nobody is to blame."""
        stand = found.stands[0]
        seconds, place = self._standing(stand.ranks), self.last[stand.ranks[0]].place
        if len(found.stands) == 1:
            what = f"{self._name_operation(stand)}, which all of them have entered, hung for {seconds}"
            return f"{what}, {place}; likely a link, a network card or a GPU"
        stands = ", ".join(
            f"{self._names(stand.ranks)} in {self._name_operation(stand)} "
            f"(group {stand.group}, {stand.operation.elements} elements)"
            for stand in found.stands[:NAMED]
        )
        return f"ranks wait in different collectives for {seconds}, {place}: {stands}; likely a bug in their order"

    def _name_operation(self, stand: Stand) -> str:
        """`all_reduce 12 of all ranks`, `recv between pipeline ranks 0, 2 (node-a)`."""
        operation, everyone = stand.operation, len(stand.members) == self.world_size
        ranks = "all ranks" if everyone else f"{stand.kind} {self._names(stand.members)}".lstrip()
        if operation.peer is not None:
            return f"{operation.name} between {ranks}"
        return f"{operation.name} {operation.number} of {ranks}"

    def _standing(self, ranks: Sequence[int]) -> str:
        return f"{max(self.last[rank].standing for rank in ranks):.0f} s"

    def _names(self, ranks: Sequence[int]) -> str:
        """`rank 3 (node-b)`, `ranks 8, 9 (node-b)`; hosts as far as they are known."""
        numbers = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
        hosts = ", ".join(sorted({self.last[rank].host for rank in ranks[:NAMED] if rank in self.last}))
        return f"rank{'s' * (len(ranks) > 1)} {numbers}{f' ({hosts})' * bool(hosts)}"
