"""Training jobs on the cluster, by launch/slurm/pretrain.sbatch, for tests that stop them in every way.

Design choices:
- What a job is doing is read from its run directory; Slurm is asked only whether the job is still there.
- Steps are cheap, so there are many: the moment at which a test interferes takes a second to arrive.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatrain.observe.records import read
from megatrain.resilience.outcome import read_outcome
from tests.distributed.command import ROOT, curve, keys

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"
STEPS = 400
OVERRIDES = (
    "precision=fp64",
    "engine.zero_stage=3",
    "saving.every=20",
    "logger.console.every=0",
)


@dataclass
class Job:
    """A job and its run directory. max_steps: those it is to train."""

    id: str
    run_dir: Path
    log: Path
    max_steps: int

    def steps(self) -> int:
        """The last step that is written down."""
        done = curve(self.run_dir)
        return int(str(done[-1][0])) if done else 0

    def events(self, *kinds: str) -> list[str]:
        """The events of these kinds, in order."""
        return [str(e["event"]) for e in read(self.run_dir / "events.jsonl") if e["event"] in kinds]

    def starts(self) -> int:
        """How many starts have come as far as training."""
        return len(self.events("start", "resume"))

    def state(self) -> str:
        """What Slurm says of it: PENDING, RUNNING, ...; nothing when it is over."""
        said = subprocess.run(["squeue", "-h", "-j", self.id, "-o", "%T"], capture_output=True, text=True, check=False)
        return said.stdout.strip()

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Until the condition holds; fails the test, with the job's log, where the job ends or time is up before."""
        ends, asked = time.monotonic() + seconds, time.monotonic()
        while not condition():
            if time.monotonic() - asked > 2:
                asked = time.monotonic()
                assert self.state() or condition(), f"ended before {what}\n{self.said()}"
            assert time.monotonic() < ends, f"waited for {what}\n{self.said()}"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Until the step is written down."""
        self.wait_for(lambda: self.steps() >= step, f"step {step}")

    def succeed(self, seconds: float = 240) -> None:
        """Waits for its end, which has to be the run's."""
        ends = time.monotonic() + seconds
        while self.state():
            assert time.monotonic() < ends, f"still there\n{self.said()}"
            time.sleep(0.5)
        outcome = read_outcome(self.run_dir)
        assert outcome is not None, self.said()
        assert (outcome.exit_code, outcome.step) == (0, self.max_steps), self.said()

    def said(self) -> str:
        """Its log, of all its starts."""
        return self.log.read_text() if self.log.exists() else "it never began"


def wait_for_nodes(seconds: float = 120) -> None:
    """Until no node is used or away."""
    ends = time.monotonic() + seconds
    while True:
        said = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"], check=True, capture_output=True, text=True
        )
        if set(said.stdout.split()) == {"idle"}:
            return
        assert time.monotonic() < ends, said.stdout
        time.sleep(0.5)


def submit(
    data: Path,
    run_dir: Path,
    *overrides: str,
    nodes: str = "2",
    max_steps: int = STEPS,
    options: tuple[str, ...] = (),
    python: str = "",
    variables: Mapping[str, str] | None = None,
) -> Job:
    """Submits a job of 2 processes a node, once all nodes are free. options: sbatch's.

    python: what every process runs as it starts. variables: more of its environment.
    """
    wait_for_nodes()
    log, start = run_dir.parent / f"{run_dir.name}.log", run_dir.parent / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(python)
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={log}", *options, str(SCRIPT)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{start}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        **(variables or {}),
    }
    arguments = keys(data, run_dir, *OVERRIDES, f"max_steps={max_steps}", "launch.processes=2", *overrides)
    submitted = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    return Job(submitted.stdout.strip(), run_dir, log, max_steps)
