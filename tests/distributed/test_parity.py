"""Law 4: every engine in every layout trains the numbers of one process.

The reference is tests/reference.py. The rows that span the matrix run in `make test`, all of them in
`make test-parity`; benchmarks/parity.py prints them as a table.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatrain.config import FsdpConfig, Precision
from tests import reference, samples
from tests.distributed import matrix
from tests.distributed.matrix import LAYOUTS, ROWS, Row
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, train_from_start

pytestmark = pytest.mark.distributed

SPANNING = {
    # Every engine, every layout, every precision, ZeRO-3 in most of them.
    ("zero0", "dp2", Precision.fp32),
    ("zero0", "tp2 dp2", Precision.fp64),
    ("zero1", "tp2", Precision.fp64),
    ("zero1", "interleaved pp2 dp2", Precision.fp32),
    ("zero1-offload", "dp2", Precision.fp32),
    ("zero2", "dp4", Precision.fp32),
    ("zero2", "pp2", Precision.bf16),
    ("zero2-offload", "dp2", Precision.fp32),
    ("zero3", "dp2", Precision.fp32),
    ("zero3", "tp2", Precision.fp32),
    ("zero2", "tp4", Precision.fp32),
    ("zero3", "pp4", Precision.fp32),
    ("zero3", "pp2 dp2", Precision.bf16),
    ("zero3", "interleaved pp2 dp2", Precision.fp64),
    ("zero3", "interleaved pp2 tp2", Precision.fp32),
    ("zero3", "pp2 dp2 tp2", Precision.fp32),
    ("zero3-offload", "pp2 dp2", Precision.fp32),
    ("fsdp-full", "dp4", Precision.fp64),
    ("fsdp-full", "tp2 dp2", Precision.fp32),
    ("fsdp-full", "pp2 dp2", Precision.fp32),
    ("fsdp-full", "replicate2 dp4", Precision.fp64),
    ("fsdp-gradient", "dp2", Precision.bf16),
    ("fsdp-gradient", "tp2 pp2", Precision.fp64),
    ("fsdp-gradient", "interleaved pp2 dp2", Precision.fp32),
}


def spanning(row: Row) -> bool:
    return (row.engine, row.layout, row.precision) in SPANNING


def test_the_reference_trains_and_clips() -> None:
    result = matrix.one_process("plain", False, Precision.fp32)
    assert result.losses[-1] < result.losses[0] - 0.5
    assert min(result.gradient_norms) > samples.OPTIM.gradient_clip


def test_the_spanning_rows_are_rows() -> None:
    assert {(row.engine, row.layout, row.precision) for row in ROWS} >= SPANNING
    assert {row.layout for row in ROWS if spanning(row)} == set(LAYOUTS)


@pytest.mark.parametrize("row", [row for row in ROWS if spanning(row)], ids=str)
def test_parity(pool: Pool, row: Row) -> None:
    found = matrix.measure(pool, row)
    assert found.holds, found


@pytest.mark.long
@pytest.mark.parametrize("row", [row for row in ROWS if not spanning(row)], ids=str)
def test_parity_of_the_rest(pool: Pool, row: Row) -> None:
    found = matrix.measure(pool, row)
    assert found.holds, found


def test_shards_without_elements(pool: Pool) -> None:
    """Norms of two elements on three ranks: the last holds none of them."""
    model = replace(samples.MODEL, hidden_size=8, head_dim=2, num_layers=1)
    batches = matrix.global_batches(seed=0, skip=False)
    rates = [LEARNING_RATE] * len(batches)
    expected = reference.train(model, samples.OPTIM, batches, rates, 7, Precision.fp64)
    curve, *others = pool.run(
        train_from_start,
        ranks=3,
        engine=FsdpConfig(),
        precision=Precision.fp64,
        batches=batches,
        micro_batch_size=2,
        model=model,
    )
    assert others == [curve, curve]
    assert matrix.distance(curve, expected) <= 1e-12
