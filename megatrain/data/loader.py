"""What one data-parallel rank trains on, step by step, and what it evaluates on.

Design choices:
- A step is read, cut and made into inputs and targets as a whole, then sliced into micro-batches: few numpy and torch
  calls a step, whatever the micro-batch size. It happens in one thread, ahead of the trainer, pinned memory included.
- Which samples the coming steps have is found for many steps at once; they are read step by step.
- The objective is a function given from outside: data knows nothing of what is predicted.
- The state is that of the steps handed out, not of those read ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
import xxhash

from megatrain import device
from megatrain.batch import Batch, Sequences
from megatrain.data.order import Int64
from megatrain.data.plan import Plan, settings
from megatrain.data.prefetch import Prefetch
from megatrain.data.reader import Int32
from megatrain.data.samples import (
    EMPTY,
    RawSamples,
    SampleOrder,
    Source,
    held_out_order,
    read_samples,
    take_bad_members,
)
from megatrain.data.segments import Segment
from megatrain.data.slots import slots
from megatrain.data.state import State

Objective = Callable[[Sequences], Batch]


@dataclass(frozen=True)
class RankBatch:
    """What one rank computes of one global batch.

    micro_batches: equally many on every rank, all of micro_batch_size samples.
    digest: this rank's part of batch_digest, in 0..2^64-1; the global batch's is the sum over ranks, mod 2^64.
    first, last: the first and last sample n of the global batch. samples: last - first + 1.
    sequence_length: tokens of a sample. tokens: of the run until after this batch. begun: segments that begin with it.
    bad_members: those that this process met in it first, and skipped, a line each.
    wait_seconds: how long the consumer waited for it.
    """

    micro_batches: list[Batch]
    digest: int
    first: int
    last: int
    sequence_length: int = 0
    tokens: int = 0
    begun: tuple[Segment, ...] = ()
    bad_members: tuple[str, ...] = ()
    wait_seconds: float = 0.0

    @property
    def samples(self) -> int:
        """Samples of the global batch; fewer than global_batch_size only where the data end."""
        return self.last - self.first + 1


class Loader(Iterator[RankBatch]):
    """Yields one RankBatch a step from state["n"] on, until max_epochs end it. Close it when done.

    plan: what changes on the way, and the configuration. state: from Plan.state or resume_state; `step` steps were
    trained before it. rank, ranks: data parallel.
    Raises GaveUp, naming shard and member, at the step that needs an altered one.
    """

    def __init__(
        self, plan: Plan, objective: Objective, state: State, *, step: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        self._plan = plan
        self._objective = objective
        self._state = state
        self._rank, self._ranks = rank, ranks
        self._ahead = Prefetch(self._steps(state, step), plan.config.data.prefetch)

    def __next__(self) -> RankBatch:
        before = time.perf_counter()
        batch, self._state = next(self._ahead)
        return replace(batch, wait_seconds=time.perf_counter() - before)

    def state(self) -> State:
        """Where the next step begins; JSON."""
        return self._state

    def go_back(self, state: State, step: int, until: int, reason: str) -> Loader:
        """A loader in place of this one that goes on from `state`, of `step` steps, behind sample `until`."""
        self.close()
        state = self._plan.pass_over(state, step, until, reason)
        return Loader(self._plan, self._objective, state, step=step, rank=self._rank, ranks=self._ranks)

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._ahead.close()

    def _steps(self, state: State, step: int) -> Iterator[tuple[RankBatch, State]]:
        """Each step's batch, and the state after it."""
        config, began, located_for = self._plan.config, len(state["segments"]), None
        while True:
            state = self._plan.advance(state, step)
            first, segment, begun = state["n"], state["segments"][-1], state["segments"][began:]
            began = len(state["segments"])
            sequence_length, size = segment["sequence_length"], segment["global_batch_size"]
            micro_batch_size = settings(config, step).micro_batch_size
            if located_for != (began, micro_batch_size):
                located_for = (began, micro_batch_size)
                order = SampleOrder(self._plan.sources(sequence_length), config.seed, segment)
                places = slots(size, micro_batch_size, self._ranks, self._rank).ravel()
                located = order.steps(first, size, places)
            end = first + size if order.total_samples is None else min(first + size, order.total_samples)
            if end <= first:
                return
            n, source, sample = next(located)
            raw = read_samples(order.sources, source, sample)
            batch = self._objective(to_sequences(raw)).map(device.pin_memory)
            state, step = State({**state, "n": end}), step + 1
            yield (
                RankBatch(
                    micro_batches=split(batch, micro_batch_size),
                    digest=digest(n, raw.ids),
                    first=first,
                    last=end - 1,
                    sequence_length=sequence_length,
                    tokens=segment["tokens"] + (end - segment["from_sample"]) * sequence_length,
                    begun=tuple(begun),
                    bad_members=tuple(take_bad_members(order.sources)),
                ),
                state,
            )


def held_out_batches(
    sources: list[Source],
    objective: Objective,
    *,
    samples: int | None,
    micro_batch_size: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """This rank's micro-batches of an evaluation: as many on every rank, always the same samples.

    sources: open_sources(config, sequence_length, HELD_OUT). samples: how many over all ranks; None: all there are.
    Raises GaveUp, naming shard and member, if one was altered.
    """
    source, sample = held_out_order(sources, samples)
    for places in slots(len(sample), micro_batch_size, ranks, rank):
        real = places < len(sample)
        chosen = np.where(real, places, 0)
        raw = read_samples(sources, np.where(real, source[chosen], 0), np.where(real, sample[chosen], EMPTY))
        yield objective(to_sequences(raw)).map(device.pin_memory)


def digest(n: Int64, ids: Int32) -> int:
    """The sum mod 2^64 of xxh3_64(ids[i], seed=n[i]) over the samples that aren't EMPTY.

    n: int64[B]. ids: int32[B, S + 1], little-endian, padding included.
    """
    rows = zip(n.tolist(), ids, strict=True)
    return sum(xxhash.xxh3_64_intdigest(row, seed=number) for number, row in rows if number != EMPTY) % (1 << 64)


def to_sequences(raw: RawSamples) -> Sequences:
    """The same memory as tensors."""
    return Sequences(*(torch.from_numpy(array) for array in (raw.ids, raw.document, raw.length, raw.source)))


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in lots of `size` samples, the same memory."""
    fields = [repeat(None) if value is None else value.split(size) for value in vars(batch).values()]
    return [Batch(*lot) for lot in zip(*fields, strict=False)]
