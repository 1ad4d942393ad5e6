"""Who is waited for: in runs of a mesh that stop somewhere, by what each rank's flight recorder would say."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.resilience.collectives import Explanation, GroupRecord, Operation, explain

DATA, TENSOR = 2, 2
RANKS = range(DATA * TENSOR)
"""Rank = data index x TENSOR + tensor index."""
GROUPS = {
    "all": [list(RANKS)],
    "data": [list(RANKS[tensor::TENSOR]) for tensor in range(TENSOR)],
    "tensor": [list(RANKS[data * TENSOR :][:TENSOR]) for data in range(DATA)],
}
"""Groups of one name are disjoint, as those are that torch makes by splitting."""

Program = list[str]
"""Names of groups: which collective comes after which, the same for all ranks."""


@dataclass
class Run:
    """A program on every rank, until nobody can go on.

    stopped: a rank that enters no collective from the one numbered `at` (in the program) on.
    broken: the groups of this rank's collective `at` hangs though all enter it.
    """

    program: Program
    at: int
    stopped: int | None = None
    broken: int | None = None
    done: dict[int, int] = field(default_factory=lambda: dict.fromkeys(RANKS, 0))
    """How many collectives each rank has left."""

    def members(self, rank: int) -> list[int]:
        """Who takes part in the collective that comes next on `rank`."""
        return next(group for group in GROUPS[self.program[self.done[rank]]] if rank in group)

    def enters(self, rank: int) -> bool:
        over = self.done[rank] == len(self.program)
        return not over and not (rank == self.stopped and self.done[rank] >= self.at)

    def leaves(self, rank: int) -> bool:
        """Whether the collective in which `rank` is comes to its end."""
        place, members = self.done[rank], self.members(rank)
        if place == self.at and self.broken in members:
            return False
        return all(self.done[each] > place or (self.done[each] == place and self.enters(each)) for each in members)

    def records(self) -> dict[int, list[GroupRecord]]:
        """Runs as far as it goes; what the recorders then say."""
        while moving := [rank for rank in RANKS if self.enters(rank) and self.leaves(rank)]:
            for rank in moving:
                self.done[rank] += 1
        return {rank: [self.record(rank, name) for name in GROUPS] for rank in RANKS}

    def record(self, rank: int, name: str) -> GroupRecord:
        left, waits = self.program[: self.done[rank]].count(name), self.enters(rank)
        waits = waits and self.program[self.done[rank]] == name
        group = next(group for group in GROUPS[name] if rank in group)
        operation = Operation("all_reduce", left + 1, 8) if waits else None
        return GroupRecord(name, group[0], name, len(group), left + waits, operation)


programs = st.lists(st.sampled_from(list(GROUPS)), min_size=1, max_size=8)
silent = st.sets(st.sampled_from(RANKS))


@given(programs, st.data(), silent)
def test_named_is_exactly_the_rank_that_stopped(program: Program, data: st.DataObject, silent: set[int]) -> None:
    stopped, at = data.draw(st.sampled_from(RANKS)), data.draw(st.integers(0, len(program) - 1))
    records = Run(program, at, stopped=stopped).records()
    found = explain(records)
    assert found is not None
    assert found.absent == (stopped,)
    (stand,) = found.stands
    assert stopped in stand.members
    assert stopped not in stand.ranks
    less = explain({rank: said for rank, said in records.items() if rank not in silent})
    assert less is None or less.absent in ((stopped,), ()), "who waits is never blamed, whoever says nothing"


@given(programs, st.data(), silent)
def test_nobody_is_named_where_all_have_entered(program: Program, data: st.DataObject, silent: set[int]) -> None:
    broken, at = data.draw(st.sampled_from(RANKS)), data.draw(st.integers(0, len(program) - 1))
    run = Run(program, at, broken=broken)
    records = run.records()
    members = next(group for group in GROUPS[program[at]] if broken in group)
    operation = Operation("all_reduce", program[: at + 1].count(program[at]), 8)
    found = explain(records)
    assert found is not None
    assert not found.absent
    (stand,) = found.stands
    assert (stand.operation, stand.members, stand.ranks) == (operation, tuple(members), tuple(members))
    less = explain({rank: said for rank, said in records.items() if rank not in silent})
    assert less is None or not less.absent


def in_all(*operations: Operation, entered: int = 3) -> dict[int, list[GroupRecord]]:
    """Each rank in an operation of the same group."""
    return {
        rank: [GroupRecord("0", 0, "", len(operations), entered, operation)]
        for rank, operation in enumerate(operations)
    }


@pytest.mark.parametrize("other", [Operation("all_gather", 3, 8), Operation("all_reduce", 3, 9)])
def test_ranks_that_call_different_collectives_are_told_apart(other: Operation) -> None:
    usual = Operation("all_reduce", 3, 8)
    found = explain(in_all(usual, other, usual))
    assert found is not None
    assert [(stand.ranks, stand.operation) for stand in found.stands] == [((0, 2), usual), ((1,), other)]
    assert found.absent == ()


def test_a_gather_may_have_other_lengths_on_other_ranks() -> None:
    found = explain(in_all(Operation("gather", 3, 0), Operation("gather", 3, 9)))
    assert found is not None
    assert [stand.ranks for stand in found.stands] == [(0, 1)]


def test_the_collective_that_not_all_could_leave_is_named() -> None:
    records = in_all(
        Operation("broadcast", 3, 8), Operation("all_reduce", 4, 8), Operation("all_reduce", 4, 8), entered=4
    )
    records[0] = [replace(records[0][0], entered=3)]
    found = explain(records)
    assert found is not None
    assert found.absent == ()
    assert [(stand.ranks, stand.operation.number) for stand in found.stands] == [((0,), 3)]


@pytest.mark.parametrize("size", [2, 3])
def test_a_ring_of_waiting_ranks_is_shown(size: int) -> None:
    """Rank r waits in group r, of r and r + 1, which that one enters only after its own."""
    records = {
        rank: [
            GroupRecord(f"of {rank}", rank, "", 2, 1, Operation("all_reduce", 1, 4)),
            GroupRecord(f"of {(rank - 1) % size}", (rank - 1) % size, "", 2, 0, None),
        ]
        for rank in range(size)
    }
    found = explain(records)
    assert found is not None
    assert found.absent == ()
    assert [(stand.ranks, stand.group) for stand in found.stands] == [((rank,), f"of {rank}") for rank in range(size)]


def queues(*orders: str) -> Explanation | None:
    """Ranks that have entered the first collective of each of two groups of all, each in an order of its own."""
    return explain(
        {
            rank: [
                GroupRecord(name, 0, "", len(orders), 1, Operation("all_reduce", 1, 4, oldest=name == order[0]))
                for name in "ab"
            ]
            for rank, order in enumerate(orders)
        }
    )


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_what_all_have_entered_the_oldest_hangs(order: str) -> None:
    found = queues(order, order)
    assert found is not None
    assert [(stand.ranks, stand.group) for stand in found.stands] == [((0, 1), order[0])]


def test_queues_in_different_orders_are_a_ring() -> None:
    """NCCL takes them all, and hangs on the devices."""
    found = queues("ab", "ba")
    assert found is not None
    assert found.absent == ()
    assert [(stand.ranks, stand.group) for stand in found.stands] == [((0,), "a"), ((1,), "b")]


def test_what_waits_for_a_ring_is_not_of_it() -> None:
    waits = Operation("all_reduce", 1, 4)
    records = {
        0: [GroupRecord("a", 0, "", 2, 1, waits)],
        1: [
            GroupRecord("a", 0, "", 2, 0, None),
            GroupRecord("b", 1, "", 2, 1, waits),
            GroupRecord("c", 1, "", 2, 0, None),
        ],
        2: [GroupRecord("b", 1, "", 2, 0, None), GroupRecord("c", 1, "", 2, 1, waits)],
    }
    found = explain(records)
    assert found is not None
    assert [stand.ranks for stand in found.stands] == [(1,), (2,)]


def pipeline(*peers: int | None) -> Explanation | None:
    """Ranks of one pipeline; each receives from a peer, or nothing."""
    return explain(
        {
            rank: [
                GroupRecord("0", 0, "pipeline", len(peers), 0, None if peer is None else Operation("recv", 0, 4, peer))
            ]
            for rank, peer in enumerate(peers)
        }
    )


def test_along_a_pipeline_the_end_of_the_waiting_is_named() -> None:
    found = pipeline(1, 2, None)
    assert found is not None
    assert found.absent == (2,)
    assert found.stands[0].members == (1, 2)


def test_two_that_send_and_receive_have_both_come() -> None:
    found = pipeline(1, 0, 1)
    assert found is not None
    assert found.absent == ()
    assert [(stand.ranks, stand.members) for stand in found.stands] == [((0, 1), (0, 1))]


@pytest.mark.parametrize("peer", [-1, 7])
def test_a_peer_that_said_nothing_is_not_named(peer: int) -> None:
    assert pipeline(peer, peer) is None


def test_nothing_is_concluded_where_nobody_waits() -> None:
    assert explain({}) is None
    assert explain(Run(["all"], 1).records()) is None


def test_a_record_arrives_as_it_was_sent() -> None:
    for record in itertools.chain.from_iterable(Run(["data", "all"], 1, stopped=1).records().values()):
        assert GroupRecord.decode(asdict(record)) == record
