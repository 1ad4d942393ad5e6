"""The same seed gives the same initial weights in every layout, and no rank ever holds the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, Precision
from megatrain.engines.ranges import MASTER
from megatrain.model import spec
from megatrain.model.initialization import InitialWeights
from tests import samples
from tests.distributed.matrix import ENGINES, LAYOUTS, MODELS, Layout
from tests.distributed.pool import Pool
from tests.distributed.training import make_engine

pytestmark = pytest.mark.distributed

SEED = 3
SPANNING = ("dp4", "tp4", "pp2 dp2 tp2", "interleaved pp2 dp2")
CASES = [
    *(("zero3", layout) for layout in SPANNING),
    ("zero0", "tp2 dp2"),
    ("zero1", "interleaved pp2 dp2"),
    ("zero2-offload", "dp2"),
    ("fsdp-full", "tp4"),
    ("fsdp-gradient", "pp2 dp2"),
    ("fsdp-full", "replicate2 dp4"),
]
LONG = [("zero3", layout) for layout in LAYOUTS if layout not in SPANNING and not layout.startswith("replicate")]
"""What `make test` leaves out."""


def held(engine: str, layout: Layout) -> list[tuple[str, int, int, bool]]:
    """The task: (name, start, stop, whether the bits are those of the seed) of each range that a rank holds."""
    model = MODELS[layout.model]
    made = make_engine(ENGINES[engine], Precision.fp32, model=model, seed=SEED, parallel=layout.parallel)
    initial = InitialWeights(model, SEED)
    return [
        (shard.name, start, stop, torch.equal(shard.tensors[MASTER], initial.read(MASTER, shard.name, start, stop)))
        for shard in made.shards()
        for start, stop in shard.ranges
    ]


@pytest.mark.parametrize(
    ("engine", "layout"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
    ids=str,
)
def test_each_range_has_the_bits_of_the_seed(pool: Pool, engine: str, layout: str) -> None:
    chosen = LAYOUTS[layout]
    ranks = pool.run(held, ranks=chosen.ranks, engine=engine, layout=chosen)
    assert all(same for of_rank in ranks for *_, same in of_rank)
    for parameter in spec.parameters(MODELS[chosen.model]):
        ends = sorted(
            {(start, stop) for of_rank in ranks for name, start, stop, _ in of_rank if name == parameter.name}
        )
        assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
        assert ends[-1][1] == parameter.size


DEEP = replace(samples.MODEL, hidden_size=128, num_layers=8, intermediate_size=384)
SMALL_BUCKETS: dict[str, EngineConfig] = {
    "zero1": DeepSpeedConfig(zero_stage=1, bucket_elements=10_000),
    "zero3": DeepSpeedConfig(zero_stage=3, bucket_elements=10_000, prefetch_elements=10_000, persistence_elements=0),
    "fsdp-full": FsdpConfig(),
}
RANKS = 8
"""So many that a rank's weights, gradients, masters and moments together are smaller than all weights."""


def peak(engine: str) -> int:
    """The task: the most bytes that a rank held while it built and loaded an engine."""
    with MemTracker() as tracker:
        made = make_engine(SMALL_BUCKETS[engine], Precision.fp32, model=DEEP)
    most: int = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    del made
    return most


@pytest.mark.parametrize("engine", ["zero3", "fsdp-full"])
def test_no_rank_ever_holds_all_weights(pool: Pool, engine: str) -> None:
    whole = 4 * spec.parameter_count(DEEP)
    assert max(pool.run(peak, ranks=RANKS, engine=engine)) < 0.8 * whole


def test_the_peak_is_seen(pool: Pool) -> None:
    """ZeRO-1 does hold them, and makes its masters of them."""
    assert min(pool.run(peak, ranks=RANKS, engine="zero1")) > 4 * spec.parameter_count(DEEP)
