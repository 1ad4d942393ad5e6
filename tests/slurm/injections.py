"""What can go wrong with a job, one function each: it submits the job, does the harm, and waits until it is noticed.

Design choices:
- A seed decides when it happens and to whom, and in which layout: seeds 0, 1, 2 are three layouts. With seed 1 the
  launchers start the ranks again in place, where otherwise the job is requeued.
- Noticed means: written down where an operator looks, in outcome.json or events.jsonl. The seconds are from the harm to
  the time that is given there.
- What has to hold in the end is test_injections.py's to check.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil

from megatrain.checkpoint.folders import scan
from megatrain.observe.records import read
from megatrain.resilience.outcome import Outcome, read_outcome
from tests.slurm import inside
from tests.slurm.conftest import Cluster
from tests.slurm.jobs import Job, submit

STEPS = 120
SAVED = 20
"""Steps between two checkpoints."""
NODES, PROCESSES = 2, 2
TIMEOUT = 6.0
SLACK = 5.0
"""Seconds that may pass beyond the timeout."""
LAYOUTS = ("engine.zero_stage=3", "engine=fsdp", "engine.zero_stage=1")
WATCHDOG = ("resilience.heartbeat_seconds=0.5", f"resilience.timeout_seconds={TIMEOUT}")
ANOMALIES = tuple(f"resilience.anomalies.{key}" for key in ("window=8", "deviations=20", "repeats=2", "within=6"))


@dataclass(frozen=True)
class Found:
    """How it was noticed. seconds: after the harm, None where nothing had to be. said: the sentence.

    untrained: steps that are skipped or passed over. starts: of the ranks; more: there may be more of them.
    changed: the end isn't that of an unbroken run, and events of these kinds say why.
    """

    seconds: float | None
    said: str
    untrained: int = 0
    starts: int = 1
    more: bool = False
    changed: tuple[str, ...] = ()


@dataclass
class Scene:
    """One injection: a cluster, a folder, a set to train on; and what the seed decides.

    disk: a small file system of all nodes. step: when. rank: to whom.
    """

    kind: str
    seed: int
    slurm: Cluster
    folder: Path
    disk: Path
    data: Path
    random: Random = field(init=False)
    job: Job = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.random = Random(f"{self.kind} {self.seed}")
        self.step = self.random.randrange(2 * SAVED + 2, 4 * SAVED)
        self.rank = self.random.randrange(NODES * PROCESSES)

    @property
    def layout(self) -> str:
        return LAYOUTS[self.seed % len(LAYOUTS)]

    @property
    def node(self) -> str:
        """Where `rank` is."""
        return f"node{self.rank // PROCESSES + 1}"

    @property
    def told(self) -> Path:
        """What happens inside a process writes this file."""
        return self.folder / "told"

    def submit(
        self, *overrides: str, folder: Path | None = None, nodes_left_out: Sequence[str] = ("node3",), **wrong: Any
    ) -> Job:
        """A job on nodes 1 and 2. wrong: what happens inside `rank` (inside.py)."""
        restarts = f"resilience.restarts={int(self.seed == 1)}"
        happens = {"rank": self.rank, "step": self.step, "told": str(self.told), **wrong}
        self.job = submit(
            self.data,
            (folder or self.folder) / "run",
            *(self.layout, restarts, f"saving.every={SAVED}", *WATCHDOG, *overrides),
            max_steps=STEPS,
            options=tuple(f"--exclude={node}" for node in nodes_left_out),
            python=Path(inside.__file__).read_text(),
            variables={inside.VARIABLE: json.dumps(happens)} if wrong else {},
        )
        return self.job

    def process(self) -> psutil.Process:
        """The process of `rank`."""
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("RANK") == str(self.rank) and environment.get("SLURM_JOB_ID") == self.job.id:
                return process
        raise AssertionError(f"rank {self.rank} isn't there\n{self.job.said()}")

    def outcome(self, reason: str) -> Outcome:
        """Waits for the end of the start. reason: what has to be said, a pattern."""
        job = self.job
        job.wait_for(lambda: read_outcome(job.run_dir) is not None, "an outcome")
        outcome = read_outcome(job.run_dir)
        assert outcome is not None
        assert re.fullmatch(reason, outcome.reason), outcome.reason
        return outcome

    def again(self, seconds: float, said: str) -> Found:
        """Waits for the start after that."""
        job = self.job
        job.wait_for(lambda: job.starts() == 2, "its second start")
        return Found(seconds, said, starts=2)

    def named(self) -> str:
        """A pattern for the rank and its node."""
        return rf"rank {self.rank} \({self.node}\)"


def events(job: Job, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds, in order."""
    return [dict(event) for event in read(job.run_dir / "events.jsonl") if event["event"] in kinds]


def trained_twice(job: Job) -> int:
    """Steps before a crash that a later start trained again."""
    steps = [event["step"] for event in events(job, "crash", "resume")]
    return sum(crashed - resumed for crashed, resumed in zip(steps[::2], steps[1::2], strict=True))


def killed_rank(scene: Scene) -> Found:
    """SIGKILL."""
    return signalled(scene, signal.SIGKILL, r"(was killed by signal 9|died, last seen .+)")


def stopped_rank(scene: Scene) -> Found:
    """SIGSTOP."""
    return signalled(scene, signal.SIGSTOP, r"gave no sign of life for \d s, last seen .+")


def signalled(scene: Scene, number: signal.Signals, said: str) -> Found:
    """Sends the rank a signal. said: of it, a pattern."""
    job = scene.submit()
    job.wait_for_step(scene.step)
    began = time.time()
    scene.process().send_signal(number)
    outcome = scene.outcome(f"{scene.named()} {said}")
    return scene.again(outcome.time - began, outcome.reason)


def stuck_read(scene: Scene) -> Found:
    """A read that never returns."""
    scene.submit(kind="read")
    outcome = scene.outcome(rf"{scene.named()} hung reading data for step {scene.step} for \d s; .+")
    return scene.again(outcome.time - scene.told.stat().st_mtime, outcome.reason)


def cut_link(scene: Scene) -> Found:
    """The network cable of a node: for a moment (seed 0), or until the job has started again on the others.

    What is left of the first start on that node still sees the run directory all the while. When the link is back, its
    srun may yet cancel its step, and hit that of the second start, which has the same number: then there is a third.
    """
    job = scene.submit(nodes_left_out=())
    job.wait_for_step(scene.step)
    began = time.time()
    scene.slurm("cut-link", scene.node)
    try:
        if scene.seed == 0:
            time.sleep(TIMEOUT / 4)
            return Found(None, "the connections outlived it")
        silent = r"ranks? [\d, ]+ \(node\d\) gave no sign of life for \d s, last seen .+"
        lost = r"rank \d \(node2\) lost the store on node1 while .+"
        outcome = scene.outcome(f"{silent}|{lost}")
        return replace(scene.again(outcome.time - began, outcome.reason), more=True)
    finally:
        scene.slurm("join-link", scene.node)


def full_disk(scene: Scene) -> Found:
    """What is left wouldn't hold a checkpoint; it is freed once that was said."""
    job = scene.submit("saving.keep_last=2", "saving.retries=1", "saving.retry_seconds=0.1", folder=scene.disk)
    job.wait_for_step(scene.step)
    ballast, size = scene.disk / "ballast", os.statvfs(scene.disk)
    began = time.time()
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size.f_bavail * size.f_frsize - (256 << 10))
    job.wait_for(lambda: events(job, "save_failed") != [], "a save that fails")
    ballast.unlink()
    event = events(job, "save_failed")[0]
    assert "No space left on device" in event["reason"]
    return Found(event["time"] - began, event["reason"].partition("/checkpoints/")[2])


def altered_checkpoint(scene: Scene) -> Found:
    """A byte of the newest one, of any of its files of tensors, after a rank was killed."""
    job = scene.submit("resilience.restarts=0")
    job.wait_for_step(scene.step)
    scene.process().kill()
    scene.outcome(".+")
    newest, older = [found for found in scan(job.run_dir) if found.problem is None][:2]
    file = scene.random.choice(sorted(newest.path.glob("*.bin")))
    content = bytearray(file.read_bytes())
    content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
    file.write_bytes(content)
    altered = time.time()
    found = scene.again(0.0, "")
    (event,) = events(job, "resume")
    note = next(note for note in event["notes"] if newest.path.name in note)
    assert event["step"] == older.step
    return replace(found, seconds=event["time"] - altered, said=note.partition("/checkpoints/")[2])


def nan(scene: Scene) -> Found:
    """In the gradients of one rank."""
    scene.submit(*ANOMALIES, kind="gradients", steps=1, factor=float("nan"))
    return skipped(scene, 1, "gradient norm nan")


def spike(scene: Scene) -> Found:
    """A rank's gradients are 10,000 times as large: in one step (seed 0), or two in a row."""
    steps = 1 if scene.seed == 0 else 2
    scene.submit(*ANOMALIES, kind="gradients", steps=steps, factor=1e-4)
    return skipped(scene, steps, r"(loss|gradient norm) [\d.e+]+ above [\d.e+]+")


def skipped(scene: Scene, steps: int, reason: str) -> Found:
    """Waits for the events of so many bad steps, and for the way back where they are two."""
    job = scene.job
    job.wait_for(lambda: len(events(job, "skip")) == steps, f"{steps} skipped steps")
    skips = events(job, "skip")
    assert [event["step"] for event in skips] == [scene.step + number for number in range(steps)]
    assert all(re.fullmatch(reason, event["reason"]) for event in skips), skips
    seconds = skips[0]["time"] - scene.told.stat().st_mtime
    if steps == 1:
        return Found(seconds, f"skip: {skips[0]['reason']}", 1, changed=("skip",))
    job.wait_for(lambda: events(job, "rollback") != [], "the way back")
    (event,) = events(job, "rollback")
    first, last = event["passed_over"]
    assert first <= (scene.step - 1) * inside.GLOBAL_BATCH
    assert last >= (scene.step + 1) * inside.GLOBAL_BATCH - 1
    passed_over = (last + 1 - first) // inside.GLOBAL_BATCH
    return Found(seconds, f"rollback: {event['reason']}", passed_over, changed=("skip", "rollback", "segment"))


def slow_rank(scene: Scene) -> Found:
    """Its matrix products take longer by 30 milliseconds, which is many times as long."""
    job = scene.submit(kind="speed", seconds=0.03)
    job.wait_for(lambda: any(event["rank"] == scene.rank for event in events(job, "straggler")), "a straggler")
    event = next(event for event in events(job, "straggler") if event["rank"] == scene.rank)
    assert (event["host"], event["what"]) == (scene.node, "computing")
    said = f"straggler: rank {scene.rank} ({scene.node}), {event['step'] - scene.step} steps later"
    return Found(event["time"] - scene.told.stat().st_mtime, said)


def jumped_clock(scene: Scene) -> Found:
    """The time of day of a rank or (seed 2) of the launcher that has the lease, by an hour or ten days."""
    offset, jump = scene.folder / "offset", scene.random.choice([-3600, 3600, -864000, 864000])
    inside.replace_text(offset, "+0")
    if scene.seed == 2:
        scene.rank = inside.LAUNCHER
    job = scene.submit(kind="clock", offset=str(offset))
    job.wait_for_step(scene.step)
    assert scene.told.read_text() == "0"
    inside.replace_text(offset, f"{jump:+d}")
    job.wait_for(lambda: scene.told.read_text() == str(jump), "another time")
    return Found(None, f"{jump:+d} s: nothing depends on it")


KINDS: dict[str, tuple[Callable[[Scene], Found], float]] = {
    "killed rank": (killed_rank, SLACK),
    "stopped rank": (stopped_rank, TIMEOUT + SLACK),
    "stuck read": (stuck_read, TIMEOUT + SLACK),
    "cut link": (cut_link, TIMEOUT + SLACK),
    "full disk": (full_disk, 20.0),
    "altered checkpoint": (altered_checkpoint, 60.0),
    "NaN": (nan, SLACK),
    "spike": (spike, SLACK),
    "slow rank": (slow_rank, 60.0),
    "jumped clock": (jumped_clock, 0.0),
}
"""And within how many seconds each has to be noticed. A full disk: at the next save. An altered checkpoint: by the next
start, which Slurm delays by ten seconds. A slow rank: after two windows of slow steps."""
