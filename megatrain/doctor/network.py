"""How fast ranks reach each other, whose clock is off, and who is to blame.

Design choices:
- A pair exchanges a buffer and adds it up, which is the traffic of an all-reduce of two ranks; no group is made for it,
  so hundreds of ranks are no more work than eight. The ring is a real all-reduce of all ranks.
- Pairs play a tournament: in a round everybody has one partner, after ROUNDS rounds it is over. Up to ROUNDS
  players everybody meets everybody.
- On one node all its ranks play. On several, ranks of the same number on their node do, side by side as in training: so
  each network card is measured against those of the same rail.
- Who is slow with every partner is slow itself; two who are slow with each other only have a bad link between them.
  With two players nobody can tell which of both it is.
- Bandwidth is what nccl-tests calls bus bandwidth: bytes of the buffer x 2 (n - 1) / n by the seconds that it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain import device

ROUNDS = 8
REPEATS = 5
"""Timed exchanges, of which the fastest counts, after one that makes connections: other work disturbs, links don't."""
PINGS = 8
SLOW_SHARE = 0.5
"""Below this share of what others reach a rank, or a link, is slow."""
GIGABYTE = 1e9

Pair = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where this rank is. ranks: of the run. local_ranks: of each node, contiguous. rank: its number."""

    rank: int
    ranks: int
    local_ranks: int

    @property
    def players(self) -> list[int]:
        """The ranks that this one is paired with, itself included."""
        if self.ranks == self.local_ranks:
            return list(range(self.ranks))
        return list(range(self.rank % self.local_ranks, self.ranks, self.local_ranks))


def tournament(players: Sequence[int], rounds: int = ROUNDS) -> list[list[Pair]]:
    """Rounds of disjoint pairs, each pair once (the circle method); with an odd number one rests in each round."""
    table: list[int | None] = [*players, *([None] * (len(players) % 2))]
    found = []
    for _ in range(min(rounds, len(table) - 1)):
        facing = zip(table[: len(table) // 2], reversed(table), strict=False)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        table.insert(1, table.pop())
    return found


def measure_pairs(place: Place, megabytes: float, where: torch.device) -> dict[Pair, float]:
    """GB/s with each partner of this rank, as this rank saw it. Collective of all ranks."""
    out = torch.ones(int(megabytes * 1e6) // 4, device=where)
    back = torch.empty_like(out)
    found = {}
    for pairs in tournament(place.players):
        mine = next((pair for pair in pairs if place.rank in pair), None)
        dist.barrier()
        if mine is not None:
            peer = mine[0] if mine[1] == place.rank else mine[1]
            found[mine] = out.nbytes / GIGABYTE / _seconds(lambda peer=peer: _exchange(out, back, peer))  # type: ignore[misc]
    return found


def _exchange(out: Tensor, back: Tensor, peer: int) -> None:
    operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, back, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    torch.add(back, 1.0, out=back)


def measure_ring(place: Place, megabytes: float, where: torch.device) -> float:
    """GB/s of an all-reduce over all ranks. Collective."""
    buffer = torch.zeros(int(megabytes * 1e6) // 4, device=where)
    dist.barrier()
    seconds = _seconds(lambda: dist.all_reduce(buffer))
    return buffer.nbytes / GIGABYTE * 2 * (place.ranks - 1) / place.ranks / seconds


def _seconds(work: Callable[[], object]) -> float:
    """The least time of `work`, the device's part included."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        if (done := device.event()) is not None:
            done.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def clock_offset(place: Place, group: dist.ProcessGroup, clock: Callable[[], float] = time.time) -> dict[int, float]:
    """On rank 0: how many seconds the clock of each other node is ahead of its own; elsewhere nothing. Collective.

    group: all ranks, over the CPU. Half the fastest ping's way is how wrong it may be.
    """
    offsets = {}
    for leader in range(place.local_ranks, place.ranks, place.local_ranks):
        message = torch.zeros(1, dtype=torch.float64)
        if place.rank == 0:
            best = float("inf")
            for _ in range(PINGS):
                sent = clock()
                dist.send(message, leader, group=group)
                dist.recv(message, leader, group=group)
                came = clock()
                if came - sent < best:
                    best, offsets[leader] = came - sent, float(message) - (sent + came) / 2
        elif place.rank == leader:
            for _ in range(PINGS):
                dist.recv(message, 0, group=group)
                dist.send(message.fill_(clock()), 0, group=group)
    return offsets


def slow(pairs: Mapping[Pair, float]) -> tuple[list[int], list[Pair]]:
    """Who is slow, and which links between others are. pairs: GB/s of each, of one rail or one node."""
    best: dict[int, float] = {}
    for pair, speed in pairs.items():
        for player in pair:
            best[player] = max(best.get(player, 0.0), speed)
    if len(best) < 3:
        return [], []
    usual = median(best.values())
    ranks = [player for player in sorted(best) if best[player] < SLOW_SHARE * usual]
    links = [pair for pair, speed in sorted(pairs.items()) if not {*pair} & {*ranks} and speed < SLOW_SHARE * usual]
    return ranks, links
