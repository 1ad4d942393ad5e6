"""A pool of spawned processes whose death is noticed.

Design choices:
- Each worker has a pipe of its own, so a killed one can't leave a lock behind, and what it was working on is known.
  concurrent.futures knows neither, and may wait for ever when a worker dies while another is being started.
- `in_order` is for work that has to succeed as a whole: results in the order of the tasks, with few tasks ahead of the
  one that is wanted, and the first failure ends it. `each_in_pool` is for long work: results as they come, what fails
  is tried again by a fresh worker.
- No worker outlives the process that started it, however that ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatrain.data_prep.execute.tasks import Attempts, Failure, WorkerDiedError, attempt, outcome, prepare_process
from megatrain.errors import GAVE_UP

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2
"""Tasks of in_order under way, or done and not yet taken, for each worker."""


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
                for worker in _wait(crew):
                    number, result, error = worker.take()
                    if error is not None:
                        raise error
                    results[number] = result
            yield results.pop(wanted)
    finally:
        _stop(crew)


def each_in_pool(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int | None,
    retries: int,
    memory_bytes: int | None = None,
) -> Generator[tuple[int, Result | Failure], None, None]:
    """function(task) of each task: its number and its result or Failure, in the order in which they end.

    function, tasks and results must pickle. workers: processes; None: one for each CPU of this one. memory_bytes: what
    a worker may allocate. What a task raises is raised here if it is a MegatrainError.
    """
    attempts = Attempts(range(len(tasks)), retries)
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    crew = [_Worker(function, memory_bytes) for _ in range(workers)]
    try:
        while _give(crew, attempts, tasks):
            ended: list[tuple[int, Result | Failure]] = []
            for worker in _wait(crew):
                number, result, error = worker.take()
                if error is None:
                    ended.append((number, result))
                    continue
                crew[crew.index(worker)] = _Worker(function, memory_bytes)
                worker.stop()
                if failure := attempts.failed(number, error):
                    ended.append((number, failure))
            _give(crew, attempts, tasks)  # so that they work while the results are used
            yield from ended
    finally:
        _stop(crew)


class _Worker:
    """A process, and the number of the task it has, if any."""

    def __init__(self, function: Callable[[Any], Any], memory_bytes: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.task: int | None = None
        self._process = context.Process(target=_work, args=(function, other_end, memory_bytes), daemon=True)
        self._process.start()
        other_end.close()  # so that the worker's death ends the pipe

    def give(self, number: int, task: object) -> None:
        self.task = number
        try:
            self.connection.send(task)
        except OSError:  # It is dead: its end of the pipe is closed, and take will say so.
            return

    def take(self) -> tuple[int, Any, Exception | None]:
        """Waits for the task to end: its number, its result, and what it raised or how its process died."""
        assert self.task is not None
        number, self.task = self.task, None
        try:
            return number, *outcome(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            return number, None, WorkerDiedError(number, _how(self._process.exitcode or 0))

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _how(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "its process was killed, maybe for lack of memory"
    if exit_code < 0:
        return f"its process ended by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _give(crew: Sequence[_Worker], attempts: Attempts, tasks: Sequence[object]) -> bool:
    """Gives the idle workers what waits; whether any worker has a task."""
    for worker in crew:
        if worker.task is None and attempts.waiting:
            number = attempts.waiting.popleft()
            worker.give(number, tasks[number])
    return any(worker.task is not None for worker in crew)


def _wait(crew: Sequence[_Worker]) -> list[_Worker]:
    """The workers whose task has ended; waits for one."""
    busy = [worker for worker in crew if worker.task is not None]
    ready = wait([worker.connection for worker in busy])
    return [worker for worker in busy if worker.connection in ready]


def _stop(crew: Sequence[_Worker]) -> None:
    for worker in crew:
        worker.stop()


def _work(function: Callable[[Any], Any], connection: Connection[Any, Any], memory_bytes: int | None) -> None:
    """What a worker runs until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    prepare_process(memory_bytes)
    while True:
        connection.send_bytes(attempt(function, connection.recv()))


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(GAVE_UP)
