"""Runs an iterator ahead in a thread. No torch.

Design choices:
- A thread, never a process: nothing is forked once a device is in use, and nothing is sent between processes.
- What the iterator raises is raised where its next item was expected, as itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """The items of `items`, at most `depth` of them (at least 1) made ahead of the consumer by one daemon thread."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((item, error))  # the end stays the end, however often it is asked for
            raise error
        self._room.release()
        return item  # type: ignore[return-value]  # None only beside an error

    def close(self) -> None:
        """Ends the thread and waits for it: at most for the item that it is making."""
        self._closed = True
        self._room.release()
        self._thread.join()
        self._ready.put((None, StopIteration()))

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._closed:
                return
            try:
                self._ready.put((next(self._items), None))
            except BaseException as error:
                self._ready.put((None, error))
                return
