"""What ranks agree on, and tell each other, over a CPU store.

A store is a key-value service beside the process groups (torch.distributed.Store).

Design choices:
- No collective: agreeing never queues behind training's communication, and a background thread may do it.
- What a rank has to say for the log, the others learn when they look: nobody waits.
- One round costs each rank a few requests whatever the number of ranks: failures meet under one key, and the last
  rank to arrive writes the answer that the others wait for.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


class Agreement:
    """Calls of it are rounds: each rank says what failed, or None, and all get the same answer.

    name must differ from any other Agreement's on the store, and from that of an earlier attempt of the run whose
    store is used again. A thread that agrees in the background needs a clone of the store: waiting holds its client.
    """

    def __init__(self, store: Store, world_size: int, name: str, timeout: timedelta = timedelta(minutes=30)) -> None:
        """timeout: how long the slowest rank may take to arrive."""
        self.store = store
        self.world_size = world_size
        self.name = name
        self.timeout = timeout
        self.rounds = 0

    def __call__(self, failure: str | None) -> str | None:
        """The failure that was said first in this round, or None where no rank had one. Returns when all arrived.

        Raises torch.distributed.DistStoreError when a rank doesn't arrive within the timeout.
        """
        key = f"agreement/{self.name}/{self.rounds}"
        self.rounds += 1
        if failure is not None:
            self.store.compare_set(f"{key}/failure", "", failure)
        if self.store.add(f"{key}/arrived", 1) == self.world_size:
            failed = self.store.check([f"{key}/failure"])
            self.store.set(f"{key}/answer", self.store.get(f"{key}/failure").decode() if failed else "")
        self.store.wait([f"{key}/answer"], self.timeout)
        return self.store.get(f"{key}/answer").decode() or None


class Notices:
    """Lines that any rank has for the log, and one rank takes. No call waits for another rank.

    name: as an Agreement's.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self._lines, self._count = f"notices/{name}/lines", f"notices/{name}/count"
        self._given = 0
        self._taken: set[str] = set()

    def give(self, line: str) -> None:
        """Leaves a line, without a newline in it."""
        self.store.append(self._lines, f"{line}\n")  # type: ignore[attr-defined]
        self.store.add(self._count, 1)

    def take(self) -> list[str]:
        """What was given since the last call; what several ranks gave, once."""
        given = self.store.add(self._count, 0)
        if given == self._given:
            return []
        self._given = given
        lines = self.store.get(self._lines).decode().splitlines()
        new = [line for line in dict.fromkeys(lines) if line not in self._taken]
        self._taken.update(new)
        return new
