"""Training steps of the tiny model through the DeepSpeed engine against the plain reference loop, in one process.

Design choices:
- The reference is law 4's, tests/reference.py: the same model, batches, precision, clipping and AdamW, nothing else.
  What the engine costs beyond it is sharding, hooks, flattening and the reductions over a group of one.
- fp32 and one thread: the CPU's arithmetic is the same for all contenders, so what differs is overhead.
- A turn is a few steps, of which the first isn't counted: the reference loop starts anew each time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.common import Bar, Contender, Result, main, row, take_turns
from megatrain import device
from megatrain.batch import Batch
from megatrain.compose import compose
from megatrain.config import DeepSpeedConfig, Precision, TrainConfig
from tests import reference, samples
from tests.distributed.training import AnyEngine, make_engine, train

SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 256, 4, 2
LEARNING_RATE = 1e-3
PRECISION = Precision.fp32
STAGES = (0, 1, 2, 3)
TARGET = 0.85
"""The least share of the reference's speed at ZeRO-1."""


class Timed(list[Batch]):
    """Batches that note the CPU time whenever the next one is taken, which is when the step before it is over."""

    def __iter__(self) -> Iterator[Batch]:
        self.seconds: list[float] = []
        for batch in super().__iter__():
            self.seconds.append(time.process_time())
            yield batch
        self.seconds.append(time.process_time())

    def rate(self) -> float:
        """Tokens by CPU second, the first step left out."""
        tokens = (len(self) - 1) * GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH
        return tokens / (self.seconds[-1] - self.seconds[1])


def measure(arguments: argparse.Namespace) -> Result:
    """A row for the reference and for each ZeRO stage."""
    torch.set_num_threads(1)
    config: TrainConfig = compose("train", ["run_dir=none", "max_steps=1"])
    batches = Timed(
        samples.batch(GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, seed, config.model.vocab_size)
        for seed in range(arguments.steps + 1)
    )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    device.start(timeout_seconds=60)
    contenders: dict[str, Contender] = {"reference": partial(run_reference, config, batches)}
    for stage in STAGES:
        engine = make_engine(DeepSpeedConfig(zero_stage=stage), PRECISION, MICRO_BATCH_SIZE, config.model, config.optim)
        contenders[f"ZeRO-{stage}"] = partial(run_engine, engine, batches)
    take_turns(contenders, 1)
    rates = take_turns(contenders, arguments.rounds)
    device.finish()
    base = rates["reference"]
    rows = [row(each, rates[each], base, "tokens/CPU s") for each in contenders]
    ratio = statistics.median(rates["ZeRO-1"]) / statistics.median(base)
    return Result(rows, [Bar("ZeRO-1, share of the reference's speed", ratio, TARGET)])


def run_reference(config: TrainConfig, batches: Timed) -> float:
    """Tokens by CPU second of the plain loop."""
    rates = [LEARNING_RATE] * len(batches)
    reference.train(config.model, config.optim, batches, rates, MICRO_BATCH_SIZE, PRECISION)
    return batches.rate()


def run_engine(engine: AnyEngine, batches: Timed) -> float:
    """Tokens by CPU second of the engine."""
    train(engine, batches, MICRO_BATCH_SIZE, LEARNING_RATE)
    return batches.rate()


if __name__ == "__main__":
    sys.exit(main("Training steps of the tiny model, one process, fp32", measure, steps=3, rounds=3))
