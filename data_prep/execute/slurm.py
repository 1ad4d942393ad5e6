"""Tasks as arrays of Slurm jobs, which bring their results back in files.

    FOLDER/slurm/START/request.pickle    the function and all tasks
    FOLDER/slurm/START/0/round.json      the tasks of the first array; 1/ has those that it didn't do, and so on
    FOLDER/slurm/START/0/00003.jsonl     what its fourth job has done (journal.py)
    FOLDER/slurm/START/0/123_3.log       what it has printed

Design choices:
- A job takes its share of the tasks, through a pool with the retries of the pool. What jobs left undone when all have
  ended (time limit, memory, a lost node) is submitted as another array, among all jobs. A job that was lost is a failed
  attempt of the tasks that it was on; the tasks behind them aren't charged.
- A job that is preempted, or whose node fails, is requeued by Slurm where the cluster does so, as often as it does; it
  goes on where it was.
- The process that submits waits: it reads the journals and asks squeue, at growing intervals. If it is killed its jobs
  go on; a later start with the same folder cancels them, waits until they have ended, and submits what is needed then.
- submitit isn't used: it asks for a file a task and for accounting (sacct), and knows neither MaxArraySize nor shares.
- Pickles are read only where they can't be anyone else's: START is made anew, for this user alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TypeVar

from megatrain.data_prep.execute.config import ExecuteConfig, SlurmConfig
from megatrain.data_prep.execute.journal import Tail
from megatrain.data_prep.execute.slurm_job import REQUEST, ROUND, Request, Round, journal_path
from megatrain.data_prep.execute.tasks import Attempts, Failure, WorkerDiedError, outcome
from megatrain.errors import GaveUp, InputError

Task = TypeVar("Task")
Result = TypeVar("Result")

FIRST_PAUSE, LAST_PAUSE, GROWTH = 0.5, 15.0, 1.2
"""Seconds between two looks at the jobs, and by how much they grow."""
PATIENCE = 600.0
"""Seconds for a controller that doesn't answer, and for cancelled jobs to end."""


def each_on_slurm(
    function: Callable[[Task], Result], tasks: Sequence[Task], config: ExecuteConfig, folder: Path
) -> Generator[tuple[int, Result | Failure], None, None]:
    """As megatrain.data_prep.execute.each, by Slurm jobs."""
    if not tasks:
        return
    cluster = Cluster(folder, config.slurm)
    cluster.clear()
    folder = _new_folder(folder.resolve() / "slurm")
    workers = config.workers or config.slurm.cpus_per_task
    request = Request(function, tasks, workers, config.retries, config.worker_memory_bytes)
    _write(folder / REQUEST, pickle.dumps(request))
    attempts = Attempts(range(len(tasks)), config.retries)
    try:
        for number in count():
            if not attempts.waiting:
                return
            waiting = sorted(attempts.waiting)
            attempts.waiting.clear()
            array = Round(waiting, jobs=min(config.slurm.tasks, len(waiting)))
            yield from _do(array, folder / str(number), cluster, attempts, workers)
    except BaseException:
        cluster.cancel()
        raise


def _new_folder(parent: Path) -> Path:
    """A folder of this start alone; those of earlier ones are removed."""
    shutil.rmtree(parent, ignore_errors=True)  # A shared file system may keep a file that was open, for a while.
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=parent))


def _do(
    array: Round, folder: Path, cluster: Cluster, attempts: Attempts, workers: int
) -> Generator[tuple[int, Result | Failure], None, None]:
    """Submits jobs and waits for all; what they left undone waits in `attempts` again."""
    folder.mkdir()
    _write(folder / ROUND, json.dumps(asdict(array)).encode())
    journals = [journal_path(folder, job) for job in range(array.jobs)]
    for path in journals:
        path.touch()
    logs = cluster.submit(folder, array.jobs)
    tails = [Tail(path) for path in journals]
    left = set(array.tasks)
    pause, running = FIRST_PAUSE, True
    while left and running:
        time.sleep(pause)
        pause = min(pause * GROWTH, LAST_PAUSE)
        running = cluster.has_jobs()  # asked before reading, so that nothing is missed
        for task, data in (record for tail in tails for record in tail.new()):
            result, error = outcome(data)
            if error is not None:
                raise error
            if task in left:
                left.remove(task)
                yield task, result
    if left and not any(tail.started for tail in tails):
        raise GaveUp(f"executor=slurm: no job of the array has begun; {_last_line(logs[0])}")
    for job, tail in enumerate(tails):
        undone = [task for task in array.share(job) if task in left]
        begun = undone[:workers] if tail.started else []
        attempts.waiting.extend(undone[len(begun) :])
        for task in begun:
            lost = WorkerDiedError(task, f"its Slurm job was lost; {_last_line(logs[job])}")
            if failure := attempts.failed(task, lost):
                yield task, failure


class Cluster:
    """The cluster of this machine, and the jobs there that belong to a folder."""

    def __init__(self, folder: Path, config: SlurmConfig) -> None:
        """Raises InputError if there is no cluster, or it doesn't take such jobs."""
        self._name = f"megatrain-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]}"
        given = {
            "partition": config.partition,
            "account": config.account,
            "time": config.time,
            "cpus-per-task": config.cpus_per_task,
            "mem": config.memory,
        }
        self._options = [f"--{name}={value}" for name, value in given.items() if value is not None] + config.extra
        try:
            self._run("sbatch", "--test-only", *self._options, "--wrap=true")
            settings = self._run("scontrol", "show", "config")
        except FileNotFoundError as error:
            raise InputError(
                f"executor=slurm: {error.filename} isn't there; start it on a machine of a Slurm cluster"
            ) from None
        except subprocess.CalledProcessError as error:
            raise InputError(f"executor=slurm: {_words(error.stderr)}; see slurm.*") from None
        (most,) = (line.split("=")[1] for line in settings.splitlines() if line.startswith("MaxArraySize"))
        self._most = int(most)
        self._answered = time.monotonic()

    def submit(self, folder: Path, jobs: int) -> list[Path]:
        """Submits the jobs of a round; the log of each."""
        logs = []
        for offset in range(0, jobs, self._most):
            size = min(self._most, jobs - offset)
            program = [sys.executable, "-m", "megatrain.data_prep.execute.slurm_job", str(folder), str(offset)]
            command = ["sbatch", "--parsable", "--requeue", "--open-mode=append", f"--array=0-{size - 1}"]
            command += [f"--job-name={self._name}", f"--output={folder}/%A_%a.log", *self._options]
            try:
                printed = self._run(*command, f"--wrap=exec {shlex.join(program)}")
            except subprocess.CalledProcessError as error:
                raise GaveUp(f"executor=slurm: {_words(error.stderr)}") from None
            array = printed.strip().partition(";")[0]
            logs += [folder / f"{array}_{index}.log" for index in range(size)]
        return logs

    def has_jobs(self) -> bool:
        """Whether a job waits or runs. A controller that doesn't answer is waited for. Raises GaveUp."""
        try:
            listed = self._run("squeue", "--noheader", f"--name={self._name}", "--format=%i")
        except subprocess.CalledProcessError as error:
            if time.monotonic() - self._answered > PATIENCE:
                raise GaveUp(f"executor=slurm: {_words(error.stderr)}, for {PATIENCE:.0f} s") from None
            return True
        self._answered = time.monotonic()
        return bool(listed.strip())

    def cancel(self) -> None:
        """Asks for the end of the jobs."""
        subprocess.run(["scancel", "--quiet", f"--name={self._name}"], check=False)

    def clear(self) -> None:
        """Cancels the jobs of an earlier start, and waits for their end. Raises GaveUp."""
        started = time.monotonic()
        while self.has_jobs():
            if time.monotonic() - started > PATIENCE:
                raise GaveUp(f"executor=slurm: jobs of an earlier start don't end; scancel --name={self._name}")
            self.cancel()
            time.sleep(FIRST_PAUSE)

    @staticmethod
    def _run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _write(path: Path, data: bytes) -> None:
    """Writes a file that other machines read."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _words(text: str) -> str:
    """Text in one line."""
    return " ".join(text.split())


def _last_line(log: Path) -> str:
    """What a job printed last, and where the rest is."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return f"it left no log at {log}"
    last = next((line for line in reversed(lines) if line.strip()), "nothing printed")
    return f"{_words(last)} ({log})"
