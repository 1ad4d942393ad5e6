"""The real `megatrain` command in processes of its own, for tests that start, stop and kill it.

Design choices:
- Every process of a command carries a mark in its environment, so all can be found, whatever session they moved to and
  whoever their parent is by then: to kill them, and to see that none is left.
- Output goes to files: a child never waits for a reader, and what it said is there after a timeout.
- A hang becomes a stack: where a command runs out of time, each of its processes dumps its threads and dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import psutil

from megatrain.observe.records import Value, read
from tests.data.sets import write_set

ROOT = Path(__file__).parents[2]
MARK = "MEGATRAIN_TEST_MARK"
STEPS = 24
SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.intermediate_size=128",
    "sequence_length=32",
    "global_batch_size=8",
    "micro_batch_size=2",
    f"max_steps={STEPS}",
    "optim.warmup_steps=4",
    "optim.learning_rate=3e-3",
    "saving.every=0",
    "logger.wandb.mode=disabled",
)
"""A run of seconds. With two processes each accumulates two micro-batches."""
DOCUMENTS = [40, 7, 100, 3, 60] * 6
"""Tokens of the documents of each member: rows have unequal counts of targets."""
EPOCH = 4 * sum(DOCUMENTS) // 32
"""Samples of the set of four such members."""


def write_small_set(folder: Path) -> Path:
    """Two shards of two members, for SMALL."""
    write_set(folder, [[DOCUMENTS] * 2] * 2, vocab_size=500)
    return folder


def keys(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """What follows `megatrain train`. Of a key that is given twice the last one counts."""
    return [f"data.path={data}", f"run_dir={run_dir}", *SMALL, *overrides]


def train(data: Path, run_dir: Path, *overrides: str, processes: int = 2, **environment: str) -> Command:
    """`megatrain train` with SMALL."""
    overrides = (f"launch.processes={processes}", *overrides)
    return Command(["-m", "megatrain", "train", *keys(data, run_dir, *overrides)], run_dir.parent, environment)


def curve(run_dir: Path) -> list[tuple[Value, ...]]:
    """Step, loss, gradient norm and batch_digest of each record of a training step."""
    names = ("step", "loss", "grad_norm", "batch_digest")
    return [tuple(record[name] for name in names) for record in read(run_dir / "metrics.jsonl") if "loss" in record]


@dataclass(frozen=True)
class Finished:
    """A command that has ended: its exit code (negative: the signal that killed it) and what it said."""

    code: int
    stdout: str
    stderr: str


@dataclass
class Command:
    """A running `python ARGUMENTS`; use it in a `with`, which leaves no process of it behind."""

    arguments: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Command:
        self.mark = uuid4().hex
        self._out, self._err = (self.folder / f"{self.mark}.{name}" for name in ("out", "err"))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **self.environment, MARK: self.mark}
        environment["PYTHONFAULTHANDLER"] = "1"  # SIGABRT then dumps the stacks to stderr.
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, timeout: float = 120.0) -> Finished:
        """Waits for its end; fails the test, with what it said, where that doesn't come."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.hang(f"still runs after {timeout:.0f} seconds")
        return Finished(code, self._out.read_text(), self._err.read_text())

    def succeed(self, timeout: float = 120.0) -> None:
        """Waits for it to end with 0, having said nothing on stderr."""
        finished = self.wait(timeout)
        if finished.code or finished.stderr:
            self.fail(f"ended with {finished.code}")

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 120.0) -> None:
        """Waits until the condition holds; fails the test where the command ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                self.fail(f"ended with {self.process.returncode} before {what}")
            if time.monotonic() > deadline:
                self.hang(f"after {timeout:.0f} seconds still waiting for {what}")
            time.sleep(0.005)

    def wait_until(self, path: Path, lines: int) -> None:
        """Waits until a file has so many lines."""
        self.wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines, f"{lines} lines in {path}")

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in order."""
        ranks: dict[int, psutil.Process] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "megatrain.train" in process.cmdline() and "RANK" in (environment := process.environ()):
                    # What a rank forks looks like it, until it runs another program: the rank is the elder.
                    other = ranks.setdefault(int(environment["RANK"]), process)
                    ranks[int(environment["RANK"])] = min(process, other, key=psutil.Process.create_time)
        return [ranks[rank] for rank in sorted(ranks)]

    def processes(self) -> list[psutil.Process]:
        """All its processes that live."""
        return list(_marked(self.mark))

    def left_over(self, patience: float = 10.0) -> list[str]:
        """What still runs of it, once everything has had `patience` seconds to end."""
        deadline = time.monotonic() + patience
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(process.cmdline()) for process in alive]

    def kill(self) -> None:
        """SIGKILL to every process of it."""
        while alive := self.processes():
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)
        self.process.wait()

    def hang(self, reason: str) -> NoReturn:
        """Fails the test with the stacks of all processes too; they end."""
        processes = self.processes()
        for process in processes:  # Those that wait their turn neither notice the end of others nor write between.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGABRT)
                process.resume()
                process.wait(timeout=5)
        self.fail(reason)

    def fail(self, reason: str) -> NoReturn:
        """Fails the test with everything the command has said."""
        said = f"{self._out.read_text()}\n{self._err.read_text()}"
        raise AssertionError(f"{' '.join(self.arguments)}\n{reason}\n{said}")


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process
