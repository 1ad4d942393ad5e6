"""Ranks that hold the same bits say what they hold; who holds others is named. No torch.

Design choices:
- A rank says a hash of each thing that others hold too, over the CPU store, and goes on; nobody waits. Rank 0 looks
  once a step whether all have spoken, reads, and judges.
- By majority: of two that differ nobody can tell which one is right.
- Keys are used again after SLOTS rounds: what is in the store doesn't grow. No rank is SLOTS rounds ahead of another.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

SLOTS = 8

Hashes = dict[str, str]
"""By what is held, in words that are the same on all ranks that hold the same."""


class Comparison:
    """Rounds in which every rank says its hashes. attempt: names this start of the run. host: of this rank."""

    def __init__(self, store: Store, attempt: str, rank: int, ranks: int, host: str) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self.host = host
        self.agreed_after: int | None = None
        self._name = f"corruption/{attempt}"
        self._rounds = 0
        self._open: deque[tuple[int, int]] = deque()

    def tell(self, step: int, hashes: Hashes) -> None:
        """What this rank held after `step`. Every rank tells the same steps."""
        slot = self._rounds % SLOTS
        self.store.set(f"{self._name}/{slot}/{self.rank}", json.dumps([self.host, hashes]))
        self.store.add(f"{self._name}/{slot}/told", 1)
        self._open.append((self._rounds, step))
        self._rounds += 1

    def verdict(self) -> str | None:
        """Who holds other bits, of the rounds in which all have told by now; None where none does. For rank 0."""
        while self._open:
            number, step = self._open[0]
            slot, times = number % SLOTS, number // SLOTS + 1
            if self.store.add(f"{self._name}/{slot}/told", 0) < times * self.ranks:
                return None
            self._open.popleft()
            told = self.store.multi_get([f"{self._name}/{slot}/{rank}" for rank in range(self.ranks)])
            held = {rank: json.loads(each) for rank, each in enumerate(told)}
            if found := judge({rank: (host, hashes) for rank, (host, hashes) in held.items()}):
                since = "" if self.agreed_after is None else f"; all agreed after step {self.agreed_after}"
                return f"{found}, after step {step}{since}"
            self.agreed_after = step
        return None


def judge(held: Mapping[int, tuple[str, Hashes]]) -> str | None:
    """The sentence that names who differs; None where all agree. held: by rank, its host and its hashes."""
    for what in dict.fromkeys(what for _, hashes in held.values() for what in hashes):
        by_rank = {rank: hashes[what] for rank, (_, hashes) in held.items() if what in hashes}
        (usual, most), *others = Counter(by_rank.values()).most_common()
        if not others:
            continue
        majority = 2 * most > len(by_rank)
        ranks = [rank for rank, it in by_rank.items() if not majority or it != usual]
        names = ", ".join(f"rank {rank} ({held[rank][0]})" for rank in ranks)
        if majority:
            return f"{names}: {what} differs from what {most} other ranks hold"
        return f"{names}: {what} should be the same on all of them and isn't; which one is right can't be told"
    return None
