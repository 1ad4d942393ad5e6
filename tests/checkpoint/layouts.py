"""Layouts for the tests of checkpoints: who holds which ranges of which parameter, and ranks that are threads."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.writer import commit, write_rank
from megatrain.engines.ranges import MASTER, Shard

T = TypeVar("T")
STATES = (MASTER, "exp_avg", "exp_avg_sq")
Whole = dict[str, dict[str, Tensor]]
"""By name of the parameter and state: the whole parameter in its shape."""


@dataclass(frozen=True)
class Part:
    """Ranges of one parameter and the ranks that each hold all of them."""

    name: str
    ranges: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    world_size: int
    parts: tuple[Part, ...]

    def shards(self, rank: int, whole: Whole) -> list[Shard]:
        """What `rank` holds of `whole`, in tensors of its own."""
        shards = []
        for part in self.parts:
            if rank not in part.ranks:
                continue
            tensors = {
                state: torch.cat([value.flatten()[start:stop] for start, stop in part.ranges])
                for state, value in whole[part.name].items()
            }
            shape = tuple(whole[part.name][MASTER].shape)
            replica = part.ranks.index(rank)
            shards.append(Shard(part.name, shape, part.ranges, tensors, replica, len(part.ranks)))
        return shards


def random_whole(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Whole:
    """Any bits at all: NaNs and infinities come back as they were too."""
    generator = torch.Generator().manual_seed(seed)
    whole: Whole = {}
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        whole[name] = {
            state: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
            for state in STATES
        }
    return whole


def even_layout(shapes: dict[str, tuple[int, ...]], world_size: int) -> Layout:
    """Every parameter cut evenly over all ranks."""
    parts = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        cuts = [size * rank // world_size for rank in range(world_size + 1)]
        parts += [Part(name, ((a, b),), (rank,)) for rank, (a, b) in enumerate(itertools.pairwise(cuts))]
    return Layout(world_size, tuple(parts))


@st.composite
def layouts(draw: st.DrawFn, shapes: dict[str, tuple[int, ...]]) -> Layout:
    """Any layout: each parameter cut anywhere, the ranges dealt to a few parts, each part held by any ranks."""
    world_size = draw(st.integers(1, 5))
    parts = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=6))})
        ranges = list(itertools.pairwise(cuts))
        count = draw(st.integers(1, 3))
        for number in range(count):
            ranks = draw(st.permutations(range(world_size)))[: draw(st.integers(1, world_size))]
            parts.append(Part(name, tuple(ranges[number::count]), tuple(ranks)))
    return Layout(world_size, tuple(part for part in parts if part.ranges))


def trainer_state(step: int) -> TrainerState:
    return {
        "step": step,
        "optimizer_step": step - 1,
        "samples": step * 8,
        "data": {"n": step * 8, "segments": [], "fingerprint": "0" * 32},
        "config": {"model": {"name": "tiny"}, "seed": 0},
        "tokenizer": {"sha256": "0" * 64, "eos_id": 0},
        "wandb_run_id": None,
    }


def write(folder: Path, layout: Layout, whole: Whole, step: int = 100) -> None:
    """A committed checkpoint of `whole`, written by the ranks one after the other."""
    folder.mkdir(parents=True)
    for rank in range(layout.world_size):
        write_rank(folder, rank, layout.shards(rank, whole))
    commit(folder, step, layout.world_size, trainer_state(step))


def on_threads(world_size: int, rank_main: Callable[[int, Callable[[str | None], str | None]], T]) -> list[T]:
    """Runs rank_main(rank, agree) on a thread a rank; results in order of rank."""
    barrier = threading.Barrier(world_size, timeout=20)
    said: list[str | None] = [None] * world_size

    def main(rank: int) -> T:
        def agree(failure: str | None) -> str | None:
            said[rank] = failure
            barrier.wait()
            answer = first_failure(said)
            barrier.wait()
            return answer

        return rank_main(rank, agree)

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(main, range(world_size)))


def first_failure(said: Sequence[str | None]) -> str | None:
    return next((failure for failure in said if failure is not None), None)
