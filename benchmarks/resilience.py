"""What surviving costs each rank: CPU seconds inside the hooks of a real run, as shares of a step of one second.

    python -m benchmarks.resilience [--ranks N] [--crowd N] [--json FILE]

Design choices:
- A real run by the parts of train.py: processes over gloo, the TCP store in the process that started them, a model with
  as many tensors as llama_7b, narrow ones, and limits of skipping from a whole window of steps.
- CPU clocks of threads: those of the watchdog's are read at both ends of what is measured; on the main thread each hook
  is wrapped here. So waiting for others costs nothing, and other load on the machine little.
- Beats and comparisons come more often than by default, so that there are many. What one costs is divided by the
  default interval, at steps of a second; how long the steps here take makes no difference.
- The crowd: so many ranks are in the store with their beats and hashes; a few of them run. The watchdogs, and rank 0's
  comparison, are the only hooks that meet the others.
- What is compared is read once, by the device where there is one. The tensors here are narrow: the runs count what it
  takes to ask for it. How fast a CPU reads is a bar of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial, wraps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store, _get_default_store

from benchmarks.common import Bar, Result, Row, main
from megatrain import checks, device, train
from megatrain.compose import compose
from megatrain.config import TrainConfig
from megatrain.engines.checksums import CorruptionCheck, checksums
from megatrain.observe.events import SkipSink
from megatrain.observe.pace import ComputeTimer, PaceSink
from megatrain.resilience.anomalies import Anomalies, AnomaliesState
from megatrain.resilience.beats import Beat
from megatrain.resilience.corruption import SLOTS, Comparison
from megatrain.resilience.progress import Progress
from megatrain.resilience.stopping import StopAgreement, StopSignal
from megatrain.resilience.stragglers import Pace, Stragglers
from megatrain.resilience.watchdog import Watchdog
from megatrain.resilience_config import ResilienceConfig
from megatrain.trainer import Trainer
from tests.distributed.command import keys, write_small_set

EVERY, BEAT_SECONDS = 10, 0.2
"""Steps between comparisons, seconds between beats."""
WARM_UP, STEPS = 20, 60
"""Steps that aren't counted (a rank has no pace before), and that are."""
NARROW = (
    "model=llama_7b",
    "model.num_layers=32",
    "model.num_kv_heads=4",
    "engine.persistence_elements=100",
    "launch.max_idle_share=0.9",
    "global_batch_size=2",
    "micro_batch_size=1",
    "data.bad_member=skip",
    "logger.console.every=0",
    f"max_steps={WARM_UP + STEPS}",
    f"resilience.corruption_every={EVERY}",
)
"""Under ZeRO-3 norms stay whole and nothing else, as of llama_7b."""
SHARE = 0.005
"""Of a step of a second: what all hooks of a rank may take."""
SUM_RATE = 5.0
"""GB of weights that a CPU sums in a second, at least."""
TIMEOUT_SECONDS = 120.0

WATCHING, COMPARING = "watchdog", "corruption"
HOOKS: Mapping[str, Sequence[tuple[type, str]]] = {
    COMPARING: [(CorruptionCheck, "after_step")],
    "anomalies": [(Anomalies, "limits"), (Anomalies, "series"), (SkipSink, "write")],
    "stopping": [(StopAgreement, "poll")],
    "notices": [(Trainer, "note_bad_members")],
    "pace": [(ComputeTimer, "_before"), (ComputeTimer, "_after"), (PaceSink, "write")],
    "place": [(Progress, "at")],
}
"""What the main thread does for each part."""

Costs = dict[str, float]
"""CPU seconds of a rank by part: of a beat, of a comparison, of a step of everything else."""


def measure(arguments: argparse.Namespace) -> Result:
    """Rows of each part of each run, and of all of it."""
    rows: list[Row] = []
    bars = [Bar("GB of weights summed by CPU second", sum_rate(), SUM_RATE)]
    for stage, crowd in ((3, arguments.ranks), (3, arguments.crowd), (1, arguments.ranks)):
        name, costs = f"ZeRO-{stage}, {crowd} ranks", run(stage, arguments.ranks, crowd)
        rows += table(name, costs)
        most = max(sum(shares(rank).values()) for rank in costs)
        bars.append(Bar(f"{name}: {SHARE:.1%} of a step over what all hooks take", SHARE / most, 1.0))
    return Result(rows, bars)


def shares(costs: Costs) -> Costs:
    """Of a step of a second, at the default intervals."""
    defaults = ResilienceConfig()
    intervals = {WATCHING: defaults.heartbeat_seconds, COMPARING: defaults.corruption_every}
    return {part: seconds / intervals.get(part, 1) for part, seconds in costs.items()}


def table(name: str, costs: Sequence[Costs]) -> Iterator[Row]:
    """The rows of a run: rank 0, and the rank of the others that spends most. %: of a step of a second."""

    def line(part: str, each: str, seconds: Sequence[float], share: Sequence[float]) -> Row:
        return {
            "run": name,
            "part": part,
            "each": each,
            "us, rank 0": round(1e6 * seconds[0]),
            "us, others": round(1e6 * max(seconds[1:])),
            "%, rank 0": round(100 * share[0], 4),
            "%, others": round(100 * max(share[1:]), 4),
        }

    for part in costs[0]:
        each = {WATCHING: "beat", COMPARING: "comparison"}.get(part, "step")
        yield line(part, each, [rank[part] for rank in costs], [shares(rank)[part] for rank in costs])
    totals = [sum(shares(rank).values()) for rank in costs]
    yield line("all", "second", totals, totals)


def sum_rate() -> float:
    """GB that checksums read by CPU second."""
    torch.set_num_threads(1)
    weights = torch.ones(1 << 28, dtype=torch.bfloat16)
    began = time.thread_time()
    for _ in checksums([("weights", [weights])]):
        pass
    return weights.nbytes / 1e9 / (time.thread_time() - began)


def run(stage: int, ranks: int, crowd: int) -> list[Costs]:
    """Trains on so many processes; what each spent."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as processes,
    ):
        write_small_set(Path(folder) / "set")
        work = partial(rank_main, ranks=ranks, port=store.port, folder=Path(folder), stage=stage, crowd=crowd)
        running = [processes.submit(work, rank) for rank in range(ranks)]
        for each in as_completed(running):
            each.result()  # Where one fails, its error comes first, not that of those who wait for it.
        return [each.result() for each in running]


def rank_main(rank: int, ranks: int, port: int, folder: Path, stage: int, crowd: int) -> Costs:
    """What each of the processes does."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    device.start(TIMEOUT_SECONDS)
    costs = train_and_count(folder, stage, crowd)
    device.finish()
    return costs


def train_and_count(folder: Path, stage: int, crowd: int, overrides: Sequence[str] = ()) -> Costs:
    """Trains on the set in `folder`; what this rank's hooks take. Every rank of the process group calls it."""
    arguments = keys(folder / "set", folder / "run", *NARROW, f"engine.zero_stage={stage}", *overrides)
    config: TrainConfig | None = compose("train", arguments)
    assert config is not None
    sources = checks.check(config)
    (folder / "run").mkdir(exist_ok=True)
    stragglers = Stragglers()
    with counted_hooks() as seconds:
        trainer = train.build(config, sources, device.device(), StopSignal(), stragglers)
        trainer.anomalies.restore(whole_window(config))
        watchdog = join_crowd(trainer, stragglers, crowd)
        watchdog.start()
        train_to(trainer, WARM_UP)
        seconds.clear()
        beats, watching = watched(watchdog)
        train_to(trainer, WARM_UP + STEPS)
        costs = {part: seconds[part] / STEPS for part in HOOKS}
        beats_after, watching_after = watched(watchdog)
    assert len(watchdog.beats.last) == crowd
    watchdog.stop()
    trainer.loader.close()
    trainer.metrics.close()
    costs[COMPARING] *= EVERY
    return {WATCHING: (watching_after - watching) / (beats_after - beats)} | costs


def train_to(trainer: Trainer, step: int) -> None:
    """Goes on up to a step."""
    trainer.config.max_steps = step
    assert trainer.run() is None
    assert trainer.step == step


@contextmanager
def counted_hooks() -> Iterator[Counter[str]]:
    """While it is open, CPU seconds that the main thread spends in HOOKS, by part."""
    seconds: Counter[str] = Counter()
    plain = {(owner, name): getattr(owner, name) for hooks in HOOKS.values() for owner, name in hooks}
    for part, hooks in HOOKS.items():
        for owner, name in hooks:
            setattr(owner, name, counted(plain[owner, name], part, seconds))
    try:
        yield seconds
    finally:
        for (owner, name), function in plain.items():
            setattr(owner, name, function)


def counted(function: Callable[..., Any], part: str, seconds: Counter[str]) -> Callable[..., Any]:
    """The function, which adds what it takes to those of `part`."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[part] += time.thread_time() - began  # type: ignore[assignment]

    return call


def watched(watchdog: Watchdog) -> tuple[int, float]:
    """How often a watchdog has beaten, and the CPU seconds of its threads."""
    clocks = [
        time.pthread_getcpuclockid(thread.ident)
        for thread in threading.enumerate()
        if thread.name.startswith("watchdog") and thread.ident
    ]
    return watchdog.beats.last[watchdog.rank].number, sum(map(time.clock_gettime, clocks))


def whole_window(config: TrainConfig) -> AnomaliesState:
    """Steps from before the first, so that there are limits, which none of the run's steps is above."""
    first = -2 * config.resilience.anomalies.window
    good = [(step, 1e3 * 1.01 ** (step % 7), 1e3 * 1.01 ** (step % 5)) for step in range(first, 1)]
    return AnomaliesState(good=good, bad=[], since=first, rollbacks=0)


def join_crowd(trainer: Trainer, stragglers: Stragglers, crowd: int) -> Watchdog:
    """Puts the ranks that don't run into the store. This rank's watchdog, which meets them as its comparison does."""
    rank, ranks, store = dist.get_rank(), dist.get_world_size(), client()
    assert (WARM_UP + STEPS) // EVERY <= SLOTS
    for other in range(ranks, crowd) if rank == 0 else ():
        place, pace = trainer.progress.place, Pace(WARM_UP, 0.01, 0.001, 1.0)
        beat = Beat(1, f"node-{other // 8}", launcher=1, pid=1, place=place, standing=0.0, pace=pace)
        store.set(f"watchdog/1/{other}", beat.encode())
        comparison = Comparison(store, "1", other, crowd, f"node-{other // 8}")
        for step in range(EVERY, WARM_UP + STEPS + 1, EVERY):
            comparison.tell(step, dict.fromkeys(("norms", "weights"), f"{step:016x}"))
    dist.barrier()
    assert trainer.corruption is not None
    trainer.corruption.comparison = Comparison(store, "1", rank, crowd, "node-0")
    config = trainer.config
    return Watchdog(
        trainer.progress,
        client(),
        "1",
        Path(config.run_dir),
        rank,
        crowd,
        BEAT_SECONDS,
        config.resilience.timeout_seconds,
        stragglers=stragglers if rank == 0 else None,
    )


def client() -> Store:
    """A connection of its own to the run's store."""
    store: Store = _get_default_store().clone()  # type: ignore[attr-defined]
    return PrefixStore("costs", store)


if __name__ == "__main__":
    sys.exit(main("What surviving costs a rank", measure, ranks=2, crowd=512))
