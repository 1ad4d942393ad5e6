"""Who waits for whom, by what each rank's flight recorder says of its collectives.

Design choices:
- A rank that waits in a collective waits for those of its group that haven't entered it; one that waits in a send or a
  receive waits for its peer. Named is who is waited for and waits in nothing itself: with tensor, pipeline and
  data-parallel groups most ranks wait for a rank that waits for another.
- With NCCL a rank enters collectives long before its device comes to them. The oldest that isn't over is what it waits
  in; those of other groups are queued behind, and others may wait for it there.
- Nothing is concluded about a rank that said nothing: some of a group may be missing.
- A collective that all its ranks have entered can't be blamed on one of them, nor can ranks that wait for each other.
- This file knows no torch: parallel/flight_recorder.py reads torch's recorder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

ALL_REDUCE = "all_reduce"


@dataclass(frozen=True)
class Operation:
    """One that a rank has entered and not left.

    name: as torch says it ("all_reduce"). number: counts the group's collectives, alike on each of its ranks.
    elements: of this rank's input. peer: the other rank of a send or a receive; None of a collective.
    oldest: of all that the rank is in.
    """

    name: str
    number: int
    elements: int
    peer: int | None = None
    oldest: bool = True


@dataclass(frozen=True)
class GroupRecord:
    """What one rank's recorder says of a process group that the rank is in.

    name, first: torch's name and the lowest rank; only together they are the group's alone.
    kind: for people ("data-parallel"), or nothing. size: how many ranks. entered: the number of the last collective
    that this rank entered, 0 for none. waiting: the oldest of the group that it hasn't left.
    """

    name: str
    first: int
    kind: str
    size: int
    entered: int
    waiting: Operation | None

    @staticmethod
    def decode(fields: dict[str, Any]) -> GroupRecord:
        """The reverse of dataclasses.asdict."""
        waiting = fields.pop("waiting")
        return GroupRecord(**fields, waiting=waiting and Operation(**waiting))


class Recorder(Protocol):
    """A rank's flight recorder. Either call may take as long as a device that doesn't answer."""

    def records(self) -> tuple[GroupRecord, ...]:
        """What it says of each group of this rank; nothing where it doesn't see all that a rank may wait in."""

    def trace(self) -> bytes:
        """All of it, as a file for torch's analyzer."""


@dataclass(frozen=True)
class Stand:
    """Ranks that wait in the same operation.

    group, kind, members: the group's name, kind and ranks, as far as these said something; of a send or a receive both
    ends.
    """

    ranks: tuple[int, ...]
    operation: Operation
    group: str
    kind: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Explanation:
    """absent: who is waited for and waits in nothing; none where nobody can be named.

    stands: what is waited in. A single one: the absent haven't entered it, or all of its group have. Several: in each
    somebody waits for the ranks of another.
    """

    absent: tuple[int, ...]
    stands: tuple[Stand, ...]


def explain(records: Mapping[int, Sequence[GroupRecord]]) -> Explanation | None:
    """Why ranks wait, or None where that can't be told. records: of the ranks that have said something."""
    groups: dict[tuple[str, int], dict[int, GroupRecord]] = {}
    for rank, said in sorted(records.items()):
        for record in said:
            groups.setdefault((record.name, record.first), {})[rank] = record
    meetings = [meeting for group in groups.values() for meeting in _meetings(group)]
    waiting = {rank for rank, said in records.items() if any(record.waiting for record in said)}
    blaming = [meeting for meeting in meetings if meeting.late - waiting]
    if blaming:
        missed = max(blaming, key=lambda meeting: len(meeting.entered))
        return Explanation(tuple(sorted(missed.late - waiting)), missed.stands()[:1])
    for meeting in meetings:
        if meeting.whole and not meeting.blocking:
            return Explanation((), meeting.stands())
    ring = _ring(meetings)
    return Explanation((), ring) if ring else None


@dataclass(frozen=True)
class _Meeting:
    """A collective, or a send with its receive, that ranks wait in.

    members: who takes part, of those that said something. whole: all did. entered: who waits in it, and how they
    called it. late: who hasn't entered it.
    """

    group: str
    kind: str
    members: tuple[int, ...]
    whole: bool
    entered: dict[int, Operation]
    late: frozenset[int]

    @property
    def blocking(self) -> frozenset[int]:
        """Whom the others wait for: who hasn't entered it, or has it queued behind what it waits in."""
        return self.late | {rank for rank, operation in self.entered.items() if not operation.oldest}

    def stand(self, *ranks: int) -> Stand:
        return Stand(ranks, self.entered[ranks[0]], self.group, self.kind, self.members)

    def stands(self) -> tuple[Stand, ...]:
        """One for each different operation: one, if ranks agree. A send and its receive do."""
        called: dict[object, list[int]] = {}
        for rank, operation in self.entered.items():
            # Of other collectives ranks may give different lengths.
            elements = operation.elements if operation.name == ALL_REDUCE else None
            called.setdefault((operation.name, elements) if operation.peer is None else None, []).append(rank)
        return tuple(self.stand(*ranks) for ranks in called.values())


def _meetings(group: Mapping[int, GroupRecord]) -> Iterator[_Meeting]:
    """The oldest collective of a group that a rank waits in, and its sends and receives. group: what each rank said."""
    some = next(iter(group.values()))
    waits = {rank: record.waiting for rank, record in group.items() if record.waiting is not None}
    collectives = {rank: each for rank, each in waits.items() if each.peer is None}
    if collectives:
        number = min(each.number for each in collectives.values())
        entered = {rank: each for rank, each in collectives.items() if each.number == number}
        late = frozenset(rank for rank, record in group.items() if record.entered < number)
        yield _Meeting(some.name, some.kind, tuple(group), len(group) == some.size, entered, late)
    for rank, operation in waits.items():
        peer = operation.peer
        if peer is None:
            continue
        met = peer in waits and waits[peer].peer == rank
        if not met:
            late = frozenset({peer} & group.keys())
            yield _Meeting(some.name, some.kind, tuple(sorted((rank, peer))), bool(late), {rank: operation}, late)
        elif rank < peer:
            yield _Meeting(some.name, some.kind, (rank, peer), True, {rank: operation, peer: waits[peer]}, frozenset())


def _ring(meetings: Sequence[_Meeting]) -> tuple[Stand, ...]:
    """Ranks of which each waits for the next, and the last for the first; none where too little is known."""
    waits = {rank: each for each in meetings if each.blocking for rank in each.entered.keys() - each.blocking}
    path: list[int] = []
    rank = min(waits, default=-1)
    while rank in waits and rank not in path:
        path.append(rank)
        rank = min(waits[rank].blocking)
    return tuple(waits[each].stand(each) for each in path[path.index(rank) :]) if rank in path else ()
