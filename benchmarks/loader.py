"""The loader of one rank against plain reads of the same tokens: a numpy memmap, and the stock webdataset reader.

Design choices:
- The loader is run as training runs it: shuffled order, document masks, objective, digests, micro-batches, its thread.
  The others do less: the memmap is read in a shuffled order of windows, webdataset in the order of the tar; both end
  at int32 tensors [samples, S+1].
- One torch thread, as `megatrain train` gives a rank its share of the cores: with more, the loader's few small
  operations a batch leave OpenMP threads spinning, and their CPU time counts.
- Everything lies in the page cache, and one epoch of the set is read each time. Documents have 1,000 tokens on average.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.common import Bar, Contender, Result, Row, main, rate, row, take_turns
from megatrain import objectives
from megatrain.config import DataConfig, SourceConfig, TrainConfig
from megatrain.data.format import ShardSet
from megatrain.data.loader import Loader
from megatrain.data.plan import Plan
from megatrain.data.samples import open_sources
from tests.data.sets import row as stored_row
from tests.data.sets import write_set

LENGTHS = (512, 2048)
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 64, 8
MEMBER_TOKENS = 1 << 21
DOCUMENT_TOKENS = 1000
TARGET = 20.0
"""Million tokens by CPU second at the longest sequence."""


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each contender at each sequence length."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_set(folder, arguments.tokens)
        flat = write_flat(shards, folder / "tokens.bin")
        for length in LENGTHS:
            contenders: dict[str, Contender] = {
                "numpy memmap": lambda: rate(partial(read_memmap, flat, length)),  # noqa: B023
                "webdataset": lambda: rate(partial(read_webdataset, shards.path(0), length)),  # noqa: B023
                "megatrain loader": lambda: rate(partial(read_loader, folder, length)),  # noqa: B023
            }
            take_turns(contenders, 1)  # the page cache, the allocator, lazy imports
            rates = take_turns(contenders, arguments.rounds)
            base = rates["numpy memmap"]
            rows += [{"S": length, **row(each, rates[each], base, "Mtok/CPU s")} for each in contenders]
    best = statistics.median(rates["megatrain loader"])
    return Result(rows, [Bar(f"loader, million tokens by CPU second at S={LENGTHS[-1]}", best, TARGET)])


def make_set(folder: Path, tokens: int) -> ShardSet:
    """A set of about `tokens` tokens (uint16) in one shard."""
    random = np.random.default_rng(0)
    members = []
    for _ in range(max(1, tokens // MEMBER_TOKENS)):
        size = min(tokens, MEMBER_TOKENS)
        members.append((2 + random.exponential(DOCUMENT_TOKENS, size // DOCUMENT_TOKENS)).astype(int).tolist())
    return write_set(folder, [members], vocab_size=50_000)


def write_flat(shards: ShardSet, path: Path) -> Path:
    """Writes all tokens of a set as one flat file."""
    stored_row(shards)[0].astype(shards.id_dtype).tofile(path)
    return path


def read_memmap(path: Path, length: int) -> float:
    """Million tokens read: windows in a shuffled order, cut out of one flat file."""
    stored = np.memmap(path, np.uint16, mode="r")
    starts = np.random.default_rng(0).permutation((len(stored) - 1) // length) * length
    batches = (starts[at : at + GLOBAL_BATCH_SIZE] for at in range(0, len(starts), GLOBAL_BATCH_SIZE))
    return _tokens(
        torch.from_numpy(np.stack([stored[s : s + length + 1] for s in b]).astype(np.int32)) for b in batches
    )


def read_webdataset(shard: Path, length: int) -> float:
    """Million tokens read: members in the order of the tar, cut into windows."""
    members = webdataset.WebDataset(str(shard), shardshuffle=False)
    return _tokens(
        torch.from_numpy(windows[at : at + GLOBAL_BATCH_SIZE].astype(np.int32))
        for ids in (np.frombuffer(member["tokens"], np.uint16) for member in members)
        for windows in [sliding_window_view(ids, length + 1)[::length]]
        for at in range(0, len(windows), GLOBAL_BATCH_SIZE)
    )


def read_loader(folder: Path, length: int) -> float:
    """Million tokens read: one epoch of the loader as the one rank of a run."""
    config = TrainConfig(
        sequence_length=length,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        data=DataConfig(sources={"data": SourceConfig(path=str(folder), max_epochs=1.0)}),
    )
    plan = Plan(config, open_sources(config.data, length))
    loader = Loader(plan, objectives.build(config.objective, document_mask=True), plan.state(0))
    samples = sum(batch.samples for batch in loader)
    loader.close()
    return samples * length / 1e6


def _tokens(batches: Iterator[torch.Tensor]) -> float:
    """Million tokens of batches [samples, S+1], by S a sample."""
    return sum(len(batch) * (batch.shape[1] - 1) for batch in batches) / 1e6


if __name__ == "__main__":
    sys.exit(main("Reading tokens, one rank", measure, tokens=40_000_000, rounds=5))
