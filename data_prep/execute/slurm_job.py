"""A job of a Slurm array: its share of the tasks, by a pool of processes.

    python -m megatrain.data_prep.execute.slurm_job FOLDER OFFSET

FOLDER is a round's (slurm.py); OFFSET + SLURM_ARRAY_TASK_ID is the job's number in it.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.data_prep.execute.journal import Journal, Tail
from megatrain.data_prep.execute.pool import each_in_pool
from megatrain.errors import MegatrainError

REQUEST = "request.pickle"
ROUND = "round.json"


@dataclass(frozen=True)
class Request:
    """What all jobs of a call do; workers: processes of a job."""

    function: Callable[[Any], Any]
    tasks: Sequence[Any]
    workers: int
    retries: int
    memory_bytes: int | None


@dataclass(frozen=True)
class Round:
    """An array of jobs: the numbers of its tasks, and among how many jobs they are divided."""

    tasks: list[int]
    jobs: int

    def share(self, job: int) -> list[int]:
        """The tasks of a job, in the order in which it begins them."""
        return self.tasks[job :: self.jobs]


def journal_path(folder: Path, job: int) -> Path:
    """The journal of a job."""
    return folder / f"{job:05}.jsonl"


def run(folder: Path, job: int) -> None:
    """Does what isn't done of the job's share."""
    request = pickle.loads((folder.parent / REQUEST).read_bytes())
    path = journal_path(folder, job)
    done = {task for task, _ in Tail(path).new()}
    share = Round(**json.loads((folder / ROUND).read_text())).share(job)
    left = [task for task in share if task not in done]
    journal = Journal(path, socket.gethostname())
    tasks = [request.tasks[task] for task in left]
    try:
        for place, ended in each_in_pool(
            request.function, tasks, request.workers, request.retries, request.memory_bytes
        ):
            journal.add(left[place], pickle.dumps((ended, None)))
    except MegatrainError as error:
        journal.add(None, pickle.dumps((None, error)))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]) + int(os.environ["SLURM_ARRAY_TASK_ID"]))
