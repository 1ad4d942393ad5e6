"""What every layout holds and sends is what docs/parallelism.md says: each rank's bytes against the closed forms.

The rows that span the matrix run in `make test`, all of them in `make test-parity`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import yaml
from torch import Tensor

from megatrain import device
from megatrain.config import (
    DeepSpeedConfig,
    EngineConfig,
    FsdpConfig,
    FsdpShard,
    ModelConfig,
    Norm,
    ParallelConfig,
    Precision,
)
from megatrain.model import spec
from megatrain.model.transformer import Transformer
from tests import samples
from tests.distributed import costs
from tests.distributed.costs import Measured, Row
from tests.distributed.pool import Pool

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]

MODEL = ModelConfig(
    name="costs",
    vocab_size=1001,
    hidden_size=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    intermediate_size=352,
    qk_norm=True,
    attention_bias=True,
    mlp_bias=True,
)
"""A million parameters. Four ranks share two key-value heads, and 1001 rows don't divide."""
TIED = replace(MODEL, tie_embeddings=True, norm=Norm.layer)


def zero(stage: int) -> DeepSpeedConfig:
    """The embedding is larger than a bucket; whatever is smaller than a matrix persists."""
    return DeepSpeedConfig(zero_stage=stage, persistence_elements=1000, bucket_elements=100_000)


ENGINES: dict[str, EngineConfig] = {
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3-frees": replace(zero(3), max_live_elements=0, prefetch_elements=0),
    "fsdp-full": FsdpConfig(shard=FsdpShard.full),
    "fsdp-gradient": FsdpConfig(shard=FsdpShard.gradient),
    "fsdp-hybrid": FsdpConfig(shard=FsdpShard.full),
}


def interleaved(**parallel: int) -> ParallelConfig:
    return ParallelConfig(pipeline=2, virtual_stages=2, schedule="interleaved_1f1b", **parallel)


ONE = Row(MODEL, 2, ParallelConfig(), ENGINES["zero3"], Precision.fp32)
LAYOUTS: dict[str, Row] = {
    "dp2": replace(ONE, micro_batches=3, model=TIED),
    "dp4": replace(ONE, ranks=4, recompute=True),
    "tp2": replace(ONE, parallel=ParallelConfig(tensor=2), micro_batch_size=1),
    "tp4": replace(ONE, ranks=4, parallel=ParallelConfig(tensor=4), model=TIED, recompute=True),
    "pp2": replace(ONE, parallel=ParallelConfig(pipeline=2), model=TIED),
    "tp2 dp2": replace(ONE, ranks=4, parallel=ParallelConfig(tensor=2), recompute=True),
    "pp2 dp2": replace(ONE, ranks=4, parallel=ParallelConfig(pipeline=2), micro_batches=4),
    "tp2 pp2": replace(ONE, ranks=4, parallel=ParallelConfig(tensor=2, pipeline=2), micro_batches=4, recompute=True),
    "pp2 dp2 tp2": replace(ONE, ranks=8, parallel=ParallelConfig(tensor=2, pipeline=2), model=TIED),
    "interleaved pp2 dp2": replace(ONE, ranks=4, parallel=interleaved(), micro_batches=4, model=TIED),
}

SPANNING = {
    # Every engine, and every layout of up to four ranks; ZeRO-1 and 2 hold other gradients in bf16 than in fp32.
    "zero0 dp2 fp32",
    "zero1 dp2 bf16",
    "zero1 pp2 fp32",
    "zero2 dp2 fp32",
    "zero2 tp2 dp2 bf16",
    "zero3 dp2 bf16",
    "zero3 tp2 pp2 fp32",
    "zero3 pp2 dp2 bf16",
    "zero3-frees dp4 bf16",
    "fsdp-full tp4 fp32",
    "fsdp-full interleaved pp2 dp2 bf16",
    "fsdp-gradient tp2 bf16",
    "fsdp-gradient pp2 fp32",
    "fsdp-hybrid dp4 fp32",
}


def rows() -> dict[str, Row]:
    """By name: engine, layout, precision."""
    found = {}
    for layout, row in LAYOUTS.items():
        for engine, config in ENGINES.items():
            hybrid = engine == "fsdp-hybrid"
            parallel = replace(row.parallel, replicate=2) if hybrid else row.parallel
            for precision in (Precision.bf16, Precision.fp32):
                # Nothing is replicated on one data-parallel rank; checks.py refuses ZeRO-0 in bf16.
                if (hybrid and row.data_size == 1) or (engine == "zero0" and precision is Precision.bf16):
                    continue
                name = f"{engine} {layout} {precision.value}"
                found[name] = replace(row, engine=config, precision=precision, parallel=parallel)
    return found


ROWS = rows()


Key = TypeVar("Key")


def differences(expected: Counter[Key], found: Counter[Key], allowed: float) -> dict[Key, tuple[int, int]]:
    """What is farther from its form than `allowed`, a share of it: (expected, found)."""
    return {
        key: (expected[key], found[key])
        for key in expected.keys() | found.keys()
        if abs(found[key] - expected[key]) > allowed * expected[key]
    }


def check(row: Row, rank: int, measured: Measured) -> None:
    memory, found = costs.memory(row, rank), measured.memory
    # What has no form: sums of losses, counters, a norm.
    assert 0 <= found.pop("other", 0) - memory.pop("other", 0) < 1024
    assert differences(memory, found, 0.05) == {}
    assert differences(costs.traffic_by_ranks(row, rank, measured.groups), measured.traffic, 0.02) == {}


@pytest.mark.parametrize("name", [name for name in ROWS if name in SPANNING])
def test_costs(pool: Pool, name: str) -> None:
    check_all(pool, ROWS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ROWS if name not in SPANNING])
def test_costs_of_the_rest(pool: Pool, name: str) -> None:
    check_all(pool, ROWS[name])


def check_all(pool: Pool, row: Row) -> None:
    for rank, measured in enumerate(pool.run(costs.measure, ranks=row.ranks, row=row, timeout=100.0)):
        check(row, rank, measured)


def test_the_spanning_rows_are_rows() -> None:
    assert set(ROWS) >= SPANNING
    layouts = {layout for layout, row in LAYOUTS.items() if row.ranks <= 4}
    assert {" ".join(name.split()[1:-1]) for name in SPANNING} == layouts
    assert {name.split()[0] for name in SPANNING} == set(ENGINES)


def test_the_ranks_together_hold_the_model() -> None:
    """The forms by themselves: every master once in each replica, but for padding and what several ranks hold."""
    for name, row in ROWS.items():
        masters = sum(costs.memory(row, rank)["masters"] for rank in range(row.ranks)) / costs.MASTER_BYTES
        copies = row.data_size if name.startswith("zero0") else row.parallel.replicate
        embedding = row.model.vocab_size * row.model.hidden_size
        twice = embedding if row.model.tie_embeddings and row.parallel.pipeline > 1 else 0
        whole = spec.parameter_count(row.model) + twice
        # Four ranks hold two key-value heads twice.
        assert whole <= masters / copies <= (1.06 if row.parallel.tensor == 4 else 1.02) * whole, name


def saved_bytes(row: Row) -> float:
    """What autograd keeps of a token, besides weights, in one process."""
    dtype = device.DTYPES[row.precision.value]
    module = Transformer(row.model, recompute=row.recompute).to(dtype)
    batch = samples.batch(row.micro_batch_size, row.sequence_length, 0, row.model.vocab_size)
    weights = {costs.storage(parameter) for parameter in module.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if costs.storage(tensor) not in weights:
            saved[costs.storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch.input_ids, batch.positions, batch.start, batch.end, batch.targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / batch.input_ids.numel()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
def test_activations(precision: Precision, recompute: bool) -> None:
    """A layer's, as the difference of two models."""
    model = replace(MODEL, qk_norm=False)
    row = replace(ONE, model=model, precision=precision, recompute=recompute)
    deep, shallow = (saved_bytes(replace(row, model=replace(model, num_layers=n))) for n in (4, 2))
    # On the CPU norms aren't fused and keep what they have normalised; attention keeps a mask in numbers.
    unfused = 0 if recompute else 2 * 4 * model.hidden_size + row.weight_bytes * row.sequence_length
    assert (deep - shallow) / 2 == pytest.approx(costs.layer_activation_bytes(row) + unfused, rel=0.05)


# The example of docs/parallelism.md: llama_7b on 64 GPUs

LLAMA = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / "llama_7b.yaml").read_text()))
SAMPLES, LENGTH = 512, 4096
EXAMPLES: dict[str, tuple[EngineConfig, ParallelConfig]] = {
    "ZeRO-1, dp64": (DeepSpeedConfig(zero_stage=1), ParallelConfig()),
    "ZeRO-2, dp64": (DeepSpeedConfig(zero_stage=2), ParallelConfig()),
    "ZeRO-3, dp64": (DeepSpeedConfig(zero_stage=3), ParallelConfig()),
    "fsdp full, dp64": (FsdpConfig(), ParallelConfig()),
    "fsdp gradient, dp64": (FsdpConfig(shard=FsdpShard.gradient), ParallelConfig()),
    "fsdp full, 8 replicas of 8": (FsdpConfig(), ParallelConfig(replicate=8)),
    "fsdp full, tp2 dp32": (FsdpConfig(), ParallelConfig(tensor=2)),
    "ZeRO-1, tp8 dp8": (DeepSpeedConfig(zero_stage=1), ParallelConfig(tensor=8)),
    "ZeRO-3, tp8 dp8": (DeepSpeedConfig(zero_stage=3), ParallelConfig(tensor=8)),
    "ZeRO-1, pp4 dp16": (DeepSpeedConfig(zero_stage=1), ParallelConfig(pipeline=4)),
    "ZeRO-3, pp4 dp16": (DeepSpeedConfig(zero_stage=3), ParallelConfig(pipeline=4)),
    "fsdp gradient, pp4 dp16": (FsdpConfig(shard=FsdpShard.gradient), ParallelConfig(pipeline=4)),
    "ZeRO-1, tp4 pp2 dp8": (DeepSpeedConfig(zero_stage=1), ParallelConfig(tensor=4, pipeline=2)),
}


def example(name: str) -> str:
    """A line of the table: gigabytes on rank 0, held and sent in a step."""
    engine, parallel = EXAMPLES[name]
    row = Row(LLAMA, 64, parallel, engine, Precision.bf16, micro_batch_size=1, sequence_length=LENGTH, recompute=True)
    row = replace(row, micro_batches=SAMPLES // row.data_size)
    memory, traffic = costs.memory(row, 0), costs.traffic(row, 0)
    (stage,) = costs.stages_of(row, 0)
    # The first stage keeps as many micro-batches as there are stages; one layer is computed again at a time.
    kept = costs.layer_activation_bytes(row) * (stage.stop - stage.start) * parallel.pipeline
    activations = LENGTH * (kept + costs.layer_activation_bytes(replace(row, recompute=False)))
    state = memory["weights"] + memory["masters"] + memory["moments"]

    def sent(*groups: str) -> float:
        there = {"tp": parallel.tensor, "pp": parallel.pipeline}
        return sum(size for (group, _), size in traffic.items() if group in groups and there.get(group, 2) > 1)

    columns = [state, memory["gradients"], activations, sent("tp"), sent("dp", "shard", "replicate"), sent("pp")]
    return f"| {name} | {row.micro_batches} | " + " | ".join(f"{size / 1e9:.1f}" for size in columns) + " |"


def test_the_example_is_what_the_forms_give() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text()
    assert [line for line in map(example, EXAMPLES) if line not in page] == []
