"""The loader of one rank against other ways to read the same tokens (loader_peers.py), and what a step waits for it.

Design choices:
- Like is compared with like. `ids`: samples as stored; the loader's have the places of their documents too. `batch`:
  what a step is trained on, with targets, positions and document masks; the loader adds digests and its thread.
- The loader shuffles globally, as the memmap and torchdata do; litdata and webdataset in the neighbourhood.
- One torch thread, as `megatrain train` gives a rank its share of the cores: with more, the loader's few small
  operations a batch leave OpenMP threads spinning, and their CPU time counts.
- Everything lies in the page cache, and one epoch of the set is read each time. Documents have 1,000 tokens on average.
- Bars are of batches by CPU second at the longest sequence: wall seconds are those of a shared machine.
- The wait: the training thread asks for a batch, then is idle for the rest of a step that consumes a million tokens a
  second, as when it waits for the GPU. What counts is the wall time inside the loader's calls.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Bar, Contender, Result, Row, main, row, take_turns
from benchmarks.loader_peers import LITDATA, MEMMAP, PEERS, WEBDATASET_ONE, Peer, to_batch
from megatrain import objectives
from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data.format import ShardSet
from megatrain.data.loader import Loader
from megatrain.data.plan import Plan
from megatrain.data.samples import SampleOrder, open_sources
from megatrain.data_config import DataConfig, SourceConfig
from tests.data.sets import EOS, write_set
from tests.data.sets import row as stored_row

LENGTHS = (512, 2048)
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 64, 8
MEMBER_TOKENS = 1 << 21
DOCUMENT_TOKENS = 1000
OURS = "megatrain"
IDS, BATCH = WORKS = ("ids", "batch")
RATIOS = {MEMMAP: 0.65, WEBDATASET_ONE: 5.0, LITDATA: 1.0}
"""How fast the loader has to be at least, compared with these."""
TOKENS_PER_SECOND, LARGEST_WAIT = 1e6, 0.005


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each contender, each work and each sequence length; and the wait."""
    torch.set_num_threads(1)
    peers = [peer for peer in PEERS if peer.installed]
    for peer in PEERS:
        if not peer.installed:
            print(f"{peer.name}: left out, {peer.package} isn't installed (see benchmarks/loader_peers.py)")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_set(folder / "set", arguments.tokens)
        ids = stored_row(shards)[0].astype(np.uint16)
        for length in LENGTHS:
            stored = {peer: folder / f"{length}_{number}" for number, peer in enumerate(peers)}
            for peer, place in stored.items():
                place.mkdir()
                peer.write(ids, place, length)
            for work in WORKS:
                read = {peer.name: partial(read_peer, peer, place, length, work) for peer, place in stored.items()}
                cpu, wall = _rates({**read, OURS: partial(read_ours, folder / "set", length, work)}, arguments.rounds)
                for each in cpu:
                    rates = row(each, cpu[each], cpu[MEMMAP], "Mtok/CPU s")
                    rows.append({"S": length, "work": work, **rates, "Mtok/s": round(statistics.median(wall[each]), 3)})
        speed = {each: statistics.median(rates) for each, rates in cpu.items()}
        bars = [
            Bar(f"batches by CPU second, over those of {peer}", speed[OURS] / speed[peer], least)
            for peer, least in RATIOS.items()
            if peer in speed
        ]
        busy = 1 - share_of_waiting(folder / "set", arguments.steps)
    bars.append(Bar("share of a step outside of the loader's calls, at 1M tokens/s", busy, 1 - LARGEST_WAIT))
    return Result(rows, bars)


def _rates(read: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Million tokens by CPU second and by wall second of each contender, one a round."""
    wall: dict[str, list[float]] = {name: [] for name in read}
    contenders: dict[str, Contender] = {name: partial(_time, each, wall[name]) for name, each in read.items()}
    take_turns(contenders, 1)  # the page cache, the allocator, lazy imports
    for times in wall.values():
        times.clear()
    return take_turns(contenders, rounds), wall


def _time(amount: Callable[[], float], wall: list[float]) -> float:
    """What `amount` returns, by CPU second; by wall second into `wall`."""
    cpu_before, wall_before = time.process_time(), time.perf_counter()
    done = amount()
    wall.append(done / (time.perf_counter() - wall_before))
    return done / (time.process_time() - cpu_before)


def make_set(folder: Path, tokens: int) -> ShardSet:
    """A set of about `tokens` tokens (uint16) in one shard."""
    random = np.random.default_rng(0)
    members = []
    for _ in range(max(1, tokens // MEMBER_TOKENS)):
        size = min(tokens, MEMBER_TOKENS)
        members.append((2 + random.exponential(DOCUMENT_TOKENS, size // DOCUMENT_TOKENS)).astype(int).tolist())
    return write_set(folder, [members], vocab_size=50_000)


def read_peer(peer: Peer, folder: Path, length: int, work: str) -> float:
    """Million tokens read: one epoch, by S a sample."""
    objective = objectives.build(ObjectiveConfig(), document_mask=True)
    samples = 0
    for ids in peer.read(folder, length, GLOBAL_BATCH_SIZE):
        samples += len(to_batch(ids, EOS, objective).input_ids if work == BATCH else ids)
    return samples * length / 1e6


def read_ours(folder: Path, length: int, work: str) -> float:
    """Million tokens read: one epoch, by S a sample."""
    if work == BATCH:
        with open_loader(folder, length, max_epochs=1.0) as loader:
            return sum(batch.samples for batch in loader) * length / 1e6
    order = SampleOrder(open_sources(DataConfig(path=str(folder)), length), seed=0)
    total = order.sources[0].index.samples
    for first in range(0, total, GLOBAL_BATCH_SIZE):
        order.read(np.arange(first, min(first + GLOBAL_BATCH_SIZE, total)))
    return total * length / 1e6


@contextmanager
def open_loader(folder: Path, length: int, max_epochs: float | None) -> Iterator[Loader]:
    """The loader of the one rank of a run."""
    config = TrainConfig(
        sequence_length=length,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        data=DataConfig(sources={"data": SourceConfig(path=str(folder), max_epochs=max_epochs)}),
    )
    plan = Plan(config, open_sources(config.data, length))
    loader = Loader(plan, objectives.build(config.objective, document_mask=True), plan.state(0))
    try:
        yield loader
    finally:
        loader.close()


def share_of_waiting(folder: Path, steps: int) -> float:
    """The share of steps of S = LENGTHS[-1], a million tokens a second, that pass inside of next(loader)."""
    step_seconds = GLOBAL_BATCH_SIZE * LENGTHS[-1] / TOKENS_PER_SECOND
    inside = []
    with open_loader(folder, LENGTHS[-1], max_epochs=None) as loader:
        for _ in range(steps):
            before = time.perf_counter()
            next(loader)
            inside.append(time.perf_counter() - before)
            time.sleep(max(0.0, step_seconds - inside[-1]))
    return sum(inside[1:]) / (step_seconds * len(inside[1:]))  # the first waits for the thread to start


if __name__ == "__main__":
    sys.exit(main("Reading tokens, one rank: million tokens a second", measure, tokens=16_000_000, rounds=5, steps=50))
