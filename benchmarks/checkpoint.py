"""Checkpoints of two processes against plain writes and torch.distributed.checkpoint (DCP), on the same tensors.

    python -m benchmarks.checkpoint [--folder DIR] [--rounds N] [--json FILE]

Design choices:
- The state is a decoder's masters and moments in fp32, each parameter cut in halves, as ZeRO-3 does. DCP saves the
  halves as DTensors sharded along dimension 0, by its defaults, fsync included (more threads made no difference). Plain
  writes are the same bytes in calls of 1 MB to one file a process, with one fsync.
- Wall seconds of the slower rank from a barrier on: the disk's work and a pause of training are no CPU time. So the
  machine has to be quiet.
- Each save goes to an empty folder of the same disk; before it, the one of the turn before is removed and the disk's
  journal written. A load follows the save of what it loads: whoever reads, reads from the page cache.
- Ranges are loaded that nobody saved: one rank takes a third of each parameter, the other the rest. What arrived is
  compared after each load. Bytes read are what the kernel counted, indexes and hashes included.
- The first round isn't counted, except as a row that says what the first asynchronous save costs: it takes the memory.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Along

from benchmarks.common import Bar, Result, Row, main, row
from megatrain.checkpoint.background import BackgroundSaver
from megatrain.checkpoint.format import CHUNK_BYTES, TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.config import ModelConfig, SavingConfig
from megatrain.engines.ranges import MASTER, Shard, ShardReader, load
from megatrain.model.spec import parameters
from megatrain.resilience.agreement import Agreement
from megatrain.resilience.progress import Progress

P = ParamSpec("P")

RANKS = 2
STATES = (MASTER, "exp_avg", "exp_avg_sq")
SAVED, LOADED = (0, 1 / 2, 1), (0, 1 / 3, 1)
"""Where each parameter is cut, in shares of its elements; rank i has what lies between edges i and i + 1."""
PIECES = 3
"""Contiguous pieces that a load of one parameter's state reads: a third, the rest of that half, the other half."""
CALL_BYTES = 1 << 20
STEP = 1
TIMEOUT = timedelta(minutes=2)

PLAIN, OURS, DCP = "plain writes", "megatrain", "DCP"
SAVE, BEGIN, LOAD = "save", "begin to save", "load"


@dataclass(frozen=True)
class Turn:
    """One operation of one contender. seconds: of the slower rank. bytes_read: by all ranks."""

    seconds: float
    bytes_read: int


Figures = dict[tuple[str, str], list[Turn]]
"""The turns of each operation and contender."""


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each contender at each operation."""
    model = ModelConfig(
        name="benchmark",
        vocab_size=8191,
        hidden_size=arguments.hidden_size,
        num_layers=12,
        num_heads=8,
        num_kv_heads=8,
        intermediate_size=arguments.hidden_size * 11 // 4,
        tie_embeddings=True,
    )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder,
        ProcessPoolExecutor(RANKS, mp_context=get_context("spawn")) as ranks,
    ):
        work = partial(rank_main, port=store.port, folder=Path(folder), model=model, rounds=arguments.rounds)
        running = [ranks.submit(work, rank) for rank in range(RANKS)]
        # All ranks have the same figures. Where one fails, its error comes first, not that of those who wait for it.
        figures, *_ = [each.result() for each in as_completed(running)]
    return Result(list(rows(figures, model)), list(bars(figures, model)))


def rank_main(rank: int, port: int, folder: Path, model: ModelConfig, rounds: int) -> Figures:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=PrefixStore("gloo", store), rank=rank, world_size=RANKS, timeout=TIMEOUT)
    saved, loaded = ([*shards(model, edges, rank)] for edges in (SAVED, LOADED))
    contenders = Ours(saved, loaded, rank, store), Dcp(saved, loaded)
    figures: Figures = defaultdict(list)
    room = partial(empty, folder / "round", rank)
    for _ in range(1 + rounds):
        figures[SAVE, PLAIN].append(timed(write_plainly, saved, room(), rank))
        for each in contenders:
            saved_in = room()
            figures[SAVE, each.name].append(timed(each.save, saved_in))
            figures[LOAD, each.name].append(timed(each.load, saved_in))
            check(loaded)
            figures[BEGIN, each.name].append(timed(each.begin, room()))
            each.finish()
    dist.barrier()
    dist.destroy_process_group()
    return figures


def shards(model: ModelConfig, edges: tuple[float, ...], rank: int) -> Iterator[Shard]:
    """What `rank` holds where each parameter is cut at `edges`."""
    for parameter in parameters(model):
        start, stop = (math.ceil(parameter.size * edge) for edge in edges[rank : rank + 2])
        tensors = {state: values(state, start, stop) for state in STATES}
        yield Shard(parameter.name, (parameter.size,), ((start, stop),), tensors)


def values(state: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of every parameter's `state`."""
    return torch.arange(start, stop, dtype=torch.float32).add_(STATES.index(state))


def check(loaded: list[Shard]) -> None:
    """Asserts that a load gave the values that were saved, and wipes them for the next."""
    for shard in loaded:
        for state, tensor in shard.tensors.items():
            assert torch.equal(tensor, values(state, *shard.ranges[0])), (state, shard.name)
            tensor.zero_()


def empty(folder: Path, rank: int) -> Path:
    """The folder, empty; nothing of what was in it is left for the disk to do."""
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        folder.mkdir()
    dist.barrier()
    return folder


def timed(work: Callable[P, None], *arguments: P.args, **options: P.kwargs) -> Turn:
    """Does the work on all ranks at once."""
    dist.barrier()
    read, began = bytes_read(), time.perf_counter()
    work(*arguments, **options)
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    read_by_all = torch.tensor(bytes_read() - read)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(read_by_all)
    return Turn(seconds.item(), int(read_by_all.item()))


def bytes_read() -> int:
    """Bytes that this process has read from files, cached or not."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar:"))
    return int(line.split()[1])


def write_plainly(saved: list[Shard], folder: Path, rank: int) -> None:
    """Nothing but the bytes: one file, one fsync."""
    with (folder / str(rank)).open("wb", buffering=0) as file:
        for shard in saved:
            for tensor in shard.tensors.values():
                data = tensor.view(torch.uint8).numpy().data
                for start in range(0, len(data), CALL_BYTES):
                    file.write(data[start : start + CALL_BYTES])
        os.fsync(file.fileno())


class Ours:
    """What a run uses: CheckpointManager for a synchronous save, BackgroundSaver for an asynchronous one."""

    name = OURS

    def __init__(self, saved: list[Shard], loaded: list[Shard], rank: int, store: TCPStore) -> None:
        self.saved = saved
        self.loaded = loaded
        agree = Agreement(store.clone(), RANKS, "checkpoint", TIMEOUT)  # type: ignore[attr-defined]
        self.manager = CheckpointManager(Path(), rank, RANKS, agree)
        self.saver = BackgroundSaver(self.manager, SavingConfig(), Progress(), Progress())
        self.state: TrainerState = {
            "step": STEP,
            "optimizer_step": STEP,
            "samples": STEP,
            "data": {},
            "config": {},
            "tokenizer": {},
            "wandb_run_id": None,
        }

    def save(self, folder: Path) -> None:
        """Data, hashes, index, fsync, agreement, coverage, commit."""
        self.manager.run_dir = folder
        self.manager.save(STEP, self.saved, self.state)

    def begin(self, folder: Path) -> None:
        """Returns when training may go on."""
        self.manager.run_dir = folder
        self.saver.begin(STEP, lambda: self.saved, self.state)

    def finish(self) -> None:
        """Returns after the commit."""
        self.saver.wait()
        save = self.saver.collect()
        assert save is not None
        assert save.failure is None, save.failure

    def load(self, folder: Path) -> None:
        """Loads the newest checkpoint, every byte verified."""
        self.manager.run_dir = folder
        reader, _ = self.manager.load(self._fill)
        assert reader is not None

    def _fill(self, reader: ShardReader) -> None:
        for shard in self.loaded:
            load(shard, reader)


class Dcp:
    """torch.distributed.checkpoint."""

    name = DCP

    def __init__(self, saved: list[Shard], loaded: list[Shard]) -> None:
        mesh = init_device_mesh("cpu", (RANKS,))
        self.saved = {
            f"{state}.{shard.name}": DTensor.from_local(
                tensor, mesh, [Along(0)], shape=torch.Size(shard.shape), stride=(1,)
            )
            for shard in saved
            for state, tensor in shard.tensors.items()
        }
        self.loaded = {f"{state}.{shard.name}": tensor for shard in loaded for state, tensor in shard.tensors.items()}
        self.planner = RangePlanner(
            {f"{state}.{shard.name}": shard.ranges[0][0] for shard in loaded for state in shard.tensors}
        )
        self.group = dist.new_group()
        self._running: Future[Any]

    def save(self, folder: Path) -> None:
        """Data, metadata, fsync."""
        dcp_save(self.saved, storage_writer=FileSystemWriter(folder))

    def begin(self, folder: Path) -> None:
        """Returns when training may go on."""
        running = dcp_async_save(self.saved, storage_writer=FileSystemWriter(folder), process_group=self.group)
        assert isinstance(running, Future)
        self._running = running

    def finish(self) -> None:
        """Returns when all is written."""
        self._running.result()

    def load(self, folder: Path) -> None:
        """DCP has nothing to verify the bytes with."""
        dcp_load(self.loaded, storage_reader=FileSystemReader(folder), planner=self.planner)


class RangePlanner(DefaultLoadPlanner):
    """Plans to load any range of a flat tensor; a DTensor is cut evenly, as it was saved."""

    def __init__(self, starts: dict[str, int]) -> None:
        """starts: the first element wanted of each tensor."""
        super().__init__()
        self.starts = starts

    def create_local_plan(self) -> LoadPlan:
        """See DefaultLoadPlanner."""
        assert self.metadata is not None
        items = []
        for key, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = ChunkStorageMetadata(torch.Size([self.starts[key]]), tensor.shape)
            items += create_read_items_for_chunk_list(key, stored, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """See DefaultLoadPlanner."""
        tensor: Tensor = self.state_dict[index.fqn]
        return tensor


def rows(figures: Figures, model: ModelConfig) -> Iterator[Row]:
    """The table; a ratio is to plain writes, to our own synchronous save, or to DCP's load."""
    gigabytes = state_bytes(model) / 1e9
    rates = {key: [gigabytes / turn.seconds for turn in turns] for key, turns in figures.items()}
    for operation, base in ((SAVE, (SAVE, PLAIN)), (BEGIN, (SAVE, OURS)), (LOAD, (LOAD, DCP))):
        for key in figures:
            if key[0] == operation:
                read = round(figures[key][-1].bytes_read / 1e6, 1)
                yield {"operation": operation, **row(key[1], rates[key][1:], rates[base][1:], "GB/s"), "MB read": read}
    first = rates[BEGIN, OURS][:1]
    yield {"operation": BEGIN, **row(f"{OURS}, first", first, rates[SAVE, OURS][1:], "GB/s"), "MB read": 0.0}


def bars(figures: Figures, model: ModelConfig) -> Iterator[Bar]:
    """What has to hold."""
    seconds = {key: statistics.median(turn.seconds for turn in turns[1:]) for key, turns in figures.items()}
    ours = seconds[SAVE, OURS]
    yield Bar("a synchronous save, times as long as an asynchronous one blocks", ours / seconds[BEGIN, OURS], 4.0)
    yield Bar("synchronous save, share of DCP's speed", seconds[SAVE, DCP] / ours, 0.95)
    yield Bar("synchronous save, share of the speed of plain writes", seconds[SAVE, PLAIN] / ours, 0.8)
    pieces = PIECES * len(STATES) * len(parameters(model))
    allowed = 1.02 * state_bytes(model) + 2 * CHUNK_BYTES * pieces
    read = max(turn.bytes_read for turn in figures[LOAD, OURS])
    yield Bar("load, 1.02 times the bytes needed and two chunks a piece, over bytes read", allowed / read, 1.0)
    yield Bar("load, times as fast as DCP", seconds[LOAD, DCP] / seconds[LOAD, OURS], 1.0)


def state_bytes(model: ModelConfig) -> int:
    """Bytes of the whole state."""
    return sum(parameter.size for parameter in parameters(model)) * len(STATES) * torch.float32.itemsize


if __name__ == "__main__":
    sys.exit(main("Checkpoints of two processes", measure, hidden_size=512, rounds=9, folder=""))
