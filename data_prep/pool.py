"""A pool of spawned processes whose death is noticed.

Design choices:
- Each worker has a pipe of its own, so a killed one can't leave a lock behind, and what it was working on is known.
  concurrent.futures knows neither, and may wait for ever when a worker dies while another is being started.
- Results come in the order of the tasks, and few tasks are ahead of the one that is wanted.
- No worker outlives the process that started it, however that ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatrain.errors import GAVE_UP

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2
"""Tasks under way, or done and not yet taken, for each worker."""


class WorkerDiedError(Exception):
    """A worker was killed. `task` is the number of the task that it had."""

    def __init__(self, task: int) -> None:
        super().__init__(task)
        self.task = task


def in_order(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Generator[Result, None, None]:
    """function(task) of each task, in order, by `workers` processes; with one worker, by this process.

    function, tasks and results must pickle. What the function raises is raised here. Raises WorkerDiedError.
    """
    workers = min(workers, len(tasks))
    if workers == 1:
        yield from map(function, tasks)
        return
    crew = [_Worker(function) for _ in range(workers)]
    results: dict[int, Result] = {}
    given = 0
    try:
        for wanted in range(len(tasks)):
            while wanted not in results:
                for worker in crew:
                    if worker.task is None and given < min(len(tasks), wanted + AHEAD * workers):
                        worker.give(given, tasks[given])
                        given += 1
                busy = [worker for worker in crew if worker.task is not None]
                ready = wait([worker.connection for worker in busy])
                results.update(worker.take() for worker in busy if worker.connection in ready)
            yield results.pop(wanted)
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """A process, and the number of the task it has, if any."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.task: int | None = None
        self._process = context.Process(target=_work, args=(function, other_end), daemon=True)
        self._process.start()
        other_end.close()  # so that the worker's death ends the pipe

    def give(self, number: int, task: object) -> None:
        self.task = number
        try:
            self.connection.send(task)
        except OSError:
            raise WorkerDiedError(number) from None

    def take(self) -> tuple[int, Any]:
        """Waits for the task to be done."""
        assert self.task is not None
        try:
            result, error = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerDiedError(self.task) from None
        if error is not None:
            raise error
        number, self.task = self.task, None
        return number, result

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(function: Callable[[Any], Any], connection: Connection[Any, Any]) -> None:
    """What a worker runs until it is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        task = connection.recv()
        try:
            connection.send((function(task), None))
        except Exception as error:  # whatever it is, it belongs to the process that waits for the result
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
            connection.send((None, error))


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(GAVE_UP)
