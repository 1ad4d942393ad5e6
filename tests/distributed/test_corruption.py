"""Ranks that train hold the same bits where an engine says so; one flipped bit is found, and the run ends."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, ParallelConfig, Precision
from megatrain.engines.checksums import CorruptionCheck
from megatrain.engines.common import INTEGERS, NORM
from megatrain.errors import GAVE_UP
from megatrain.observe.records import read
from megatrain.resilience.corruption import Comparison
from megatrain.resilience.outcome import read_outcome
from tests import samples
from tests.distributed.command import ROOT, train
from tests.distributed.pool import Pool
from tests.distributed.training import make_engine
from tests.distributed.training import train as train_steps

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

RANKS = 4
GUILTY = 3
TENSOR = ParallelConfig(tensor=2)
LEFT_WHOLE = "weights of pipeline rank 0 that tensor parallelism leaves whole"
SHORT = ("zero1-bf16", "zero2-tensor", "fsdp-replicate")
"""Layouts of `make test`."""
LAYOUTS: dict[str, tuple[EngineConfig, Precision, ParallelConfig, list[str]]] = {
    "zero0": (
        DeepSpeedConfig(zero_stage=0),
        Precision.fp32,
        ParallelConfig(),
        ["weights of pipeline rank 0, tensor rank 0"],
    ),
    "zero1-bf16": (
        DeepSpeedConfig(zero_stage=1),
        Precision.bf16,
        ParallelConfig(),
        ["weights of pipeline rank 0, tensor rank 0"],
    ),
    "zero2-bf16": (
        DeepSpeedConfig(zero_stage=2),
        Precision.bf16,
        ParallelConfig(),
        ["weights of pipeline rank 0, tensor rank 0"],
    ),
    "zero3": (
        DeepSpeedConfig(persistence_elements=100),
        Precision.fp32,
        ParallelConfig(),
        ["weights of pipeline rank 0, tensor rank 0"],
    ),
    "zero2-tensor": (
        DeepSpeedConfig(zero_stage=2),
        Precision.bf16,
        TENSOR,
        [LEFT_WHOLE, "weights of pipeline rank 0, tensor rank 1"],
    ),
    "fsdp": (FsdpConfig(), Precision.bf16, ParallelConfig(), []),
    "fsdp-replicate": (
        FsdpConfig(),
        Precision.bf16,
        ParallelConfig(replicate=2),
        ["state of pipeline rank 0, shard 1, tensor rank 0"],
    ),
    "fsdp-tensor": (
        FsdpConfig(),
        Precision.bf16,
        TENSOR,
        ["state of pipeline rank 0, shard 1 that tensor parallelism leaves whole"],
    ),
}
"""An engine, and what the guilty rank holds in it that others hold too, besides the gradient norm."""


def flip_a_bit(tensor: Tensor) -> None:
    """The lowest one, of the last element."""
    with torch.no_grad():
        bits = tensor.detach().reshape(-1)[-1:].view(INTEGERS[tensor.itemsize])
        bits.bitwise_xor_(1)


def verdicts(layout: str) -> dict[str, str | None]:
    """Trains; then flips a bit in each thing that the guilty rank shares with others, and back. Rank 0's verdicts."""
    config, precision, parallel, _ = LAYOUTS[layout]
    engine = make_engine(config, precision, micro_batch_size=2, parallel=parallel)
    rank, store = dist.get_rank(), PrefixStore("corruption", _get_default_store())
    check = CorruptionCheck(engine.alike, Comparison(store, "1", rank, RANKS, "node"), every=1)
    found: dict[str, str | None] = {}

    def compare(name: str) -> None:
        at_once = check.after_step(1)
        dist.barrier()
        found[name] = at_once or (check.comparison.verdict() if rank == 0 else None)

    batches = [samples.batch(samples=8, sequence_length=16, seed=seed) for seed in range(3)]
    train_steps(engine, batches, 2)
    compare("trained")
    held = dict(engine.alike())
    names = [[name for name, tensors in held.items() if tensors]]
    dist.broadcast_object_list(names, GUILTY)
    for name in names[0]:
        for when in (name, f"{name} again"):
            if rank == GUILTY:
                flip_a_bit(held[name][-1])
            compare(when)
    return found


@pytest.mark.parametrize(
    "layout", [layout if layout in SHORT else pytest.param(layout, marks=pytest.mark.long) for layout in LAYOUTS]
)
def test_a_flipped_bit_is_found_wherever_it_can_be(layout: str, pool: Pool) -> None:
    found = pool.run(verdicts, RANKS, timeout=120, layout=layout)[0]
    shared = LAYOUTS[layout][-1]
    assert found.pop("trained") is None
    assert [name for name in found if not name.endswith(" again")] == [NORM, *shared]
    for name, verdict in found.items():
        if name.endswith(" again"):
            assert verdict is None
            continue
        assert verdict is not None
        # Where two hold it they are both named: the replica of a shard is at rank 1, the other tensor rank is 2.
        partner = 2 if "whole" in name else 1
        sentences = (
            f"rank {GUILTY} (node): {name} differs",
            f"rank {partner} (node), rank {GUILTY} (node): {name} should",
        )
        assert verdict.startswith(sentences)


RANK_1_FLIPS_A_BIT = """
import os

if os.environ.get("RANK") == "1":
    import torch
    from megatrain import trainer

    after_step = trainer.Trainer.after_step

    def flipping(self):
        if self.step == 5:
            weights = next(self.engine.modules[0].parameters()).detach()
            weights[:1].view(torch.int32).bitwise_xor_(1)
        after_step(self)

    trainer.Trainer.after_step = flipping
"""


def test_a_run_with_a_corrupt_rank_ends_and_names_it(small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RANK_1_FLIPS_A_BIT)
    run_dir = tmp_path / "run"
    replicated = ("precision=fp32", "engine.zero_stage=0", "launch.max_idle_share=0.5")
    overrides = ("max_steps=200", "resilience.corruption_every=4")
    with train(small_set, run_dir, *replicated, *overrides, processes=3, PYTHONPATH=f"{tmp_path}:{ROOT}") as command:
        finished = command.wait(240)
    assert finished.code == GAVE_UP
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert outcome.reason == (
        f"rank 1 ({socket.gethostname()}): weights of pipeline rank 0, tensor rank 0 differs from what 2 other ranks "
        "hold, after step 8; all agreed after step 4"
    )
    (event,) = (each for each in read(run_dir / "events.jsonl") if each["event"] == "corruption")
    assert event["reason"] == outcome.reason
