"""The engines on real ranks, in every layout: what it promises besides parity."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megatrain.config import CommunicationDtype, FsdpShard, Precision
from megatrain.model import spec
from tests import reference, samples
from tests.distributed.engine_life import (
    DEEPSPEED_LAYOUTS,
    EARLY,
    LATE,
    LAYOUTS,
    MICRO_BATCH,
    MODEL,
    PARAMETERS,
    RANKS,
    Facts,
    Layout,
    Watch,
    accumulate,
    batches,
    life,
    make,
)
from tests.distributed.pool import Pool
from tests.distributed.training import LEARNING_RATE, Curve, make_engine, train
from tests.engines.states import parameters_of, same, snapshot

pytestmark = pytest.mark.distributed

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture
def facts(pool: Pool, layout: Layout) -> list[Facts]:
    """Of both ranks; each layout lives once."""
    return _facts(pool, layout)


@cache
def _facts(pool: Pool, layout: Layout) -> list[Facts]:
    return pool.run(life, ranks=RANKS, layout=layout)


@cache
def one_process(precision: Precision) -> reference.Result:
    rates = [LEARNING_RATE] * len(batches())
    return reference.train(MODEL, samples.OPTIM, batches(), rates, 7, precision)


@pytest.mark.parametrize("layout", DEEPSPEED_LAYOUTS, ids=str)
def test_deepspeed_does_what_its_configuration_says(layout: Layout, facts: list[Facts]) -> None:
    for rank in facts:
        assert rank.built == {
            "stage": layout.stage,
            "bf16": layout.precision is Precision.bf16,
            "accumulation": 1,
            "clipping": (0.0, 0.0),
            "optimizer": ("AdamW", True),
            "masters": {torch.float32},
            "master devices": {"cpu"},
            "offload": layout.offload,
            "weights": {torch.bfloat16 if layout.precision is Precision.bf16 else torch.float32},
            "compiled": [],
            "sub-groups": rank.built["sub-groups"],
            "persistent": rank.built["persistent"],
        }
        assert (rank.built["sub-groups"] > 2) == (layout.stage == 3)
        assert (rank.built["persistent"] > 2) == (layout.stage == 3)
        assert rank.gradient_dtypes == {torch.float32}


@every_layout
def test_each_rank_holds_its_share(layout: Layout, facts: list[Facts]) -> None:
    shares = [rank.shard_elements for rank in facts]
    if layout.stage == 0:
        assert shares == [PARAMETERS] * RANKS
    else:
        assert sum(shares) == PARAMETERS
        assert max(shares) < 0.52 * PARAMETERS
    assert set.union(*(rank.shard_names for rank in facts)) == {parameter.name for parameter in spec.parameters(MODEL)}


@every_layout
def test_resident_bytes(layout: Layout, facts: list[Facts]) -> None:
    """Between steps, per parameter: weights, masters, moments, and gradients where they keep their memory."""
    weight = 2 if layout.precision is Precision.bf16 else 4
    master_and_moments, gradient = 4 + 8, 4
    promised = {
        0: weight + 8,
        1: weight + master_and_moments / RANKS + (gradient if layout.precision is Precision.bf16 else 0),
        2: weight + master_and_moments / RANKS,
        3: (weight + master_and_moments + gradient) / RANKS,
        FsdpShard.full: master_and_moments / RANKS,
        FsdpShard.gradient: master_and_moments / RANKS,
    }[layout.stage]
    if layout.offload:
        # Gradients that were copied to the host; ZeRO-1 and 2 also put the weights together there.
        promised += (gradient + (weight if layout.stage != 3 else 0)) / RANKS
    for rank in facts:
        # More than promised: small weights that stay whole, a bucket, buffers of offloading. Less: FSDP cuts whole
        # rows, of an odd number of which the last rank has one less.
        assert 0.99 * promised <= rank.bytes_per_parameter <= promised * (1.4 if layout.offload else 1.08)


@every_layout
def test_traffic(layout: Layout, facts: list[Facts]) -> None:
    """Bytes per parameter of a step of two micro-batches, as docs/engines.md has them."""
    weight = 2 if layout.precision is Precision.bf16 else 4
    for rank in facts:
        if layout.stage == 3:
            # A tied embedding is needed at both ends, hence more than twice.
            assert rank.traffic.keys() == {"allgather_base", "reduce_scatter_base"}
            assert rank.traffic["reduce_scatter_base"] == pytest.approx(2 * 4, rel=0.02)
            assert rank.traffic["allgather_base"] == pytest.approx(2 * 2 * weight, rel=0.25)
        elif isinstance(layout.stage, FsdpShard):
            assert set(rank.traffic) == {"allgather_base", "reduce_scatter_base"}
            # The tied embedding is gathered once in a micro-batch, as all weights are once in a step at `gradient`.
            embedding = MODEL.vocab_size * MODEL.hidden_size / PARAMETERS
            times = 2 * (2 - embedding) if layout.stage is FsdpShard.full else 1
            assert rank.traffic["reduce_scatter_base"] == pytest.approx(2 * 4, rel=0.02)
            assert rank.traffic["allgather_base"] == pytest.approx(times * weight, rel=0.02)
        else:
            gathered = {} if layout.stage == 0 else {"allgather_base": weight}
            assert rank.traffic == {"allreduce": 2 * 4 if layout.stage == 2 else 4, **gathered}


@every_layout
def test_the_host_reads_nothing(layout: Layout, facts: list[Facts]) -> None:
    """ZeRO-3 reads one scalar, which the replaced norm made on the host."""
    assert all(rank.host_reads == (layout.stage == 3) for rank in facts)


@every_layout
def test_a_fresh_engine_has_the_initial_weights(facts: list[Facts]) -> None:
    assert all(rank.fresh_is_initial for rank in facts)


@every_layout
def test_weights_are_their_masters_cast(facts: list[Facts]) -> None:
    for rank in facts:
        assert rank.weights_follow == {"fresh": True, "trained": True, "gone back": True}


@every_layout
def test_views_stay_live(facts: list[Facts]) -> None:
    assert all(rank.views_are_live for rank in facts)


@every_layout
def test_what_changes_nothing(facts: list[Facts]) -> None:
    for rank in facts:
        assert rank.unchanged == dict.fromkeys(("fresh", "skip", "nan", "no targets", "evaluate"), True)
        assert rank.nan_norm != rank.nan_norm, "a NaN on one rank has to show on all"
        assert rank.empty_norm == 0
        assert rank.empty_loss == 0


@every_layout
def test_the_disturbed_engine_ends_with_the_bits_of_the_control(facts: list[Facts]) -> None:
    assert all(rank.same_as_control for rank in facts)


@every_layout
def test_going_back_trains_the_same_again(facts: list[Facts]) -> None:
    for rank in facts:
        assert rank.after_going_back.losses == rank.curve.losses[LATE]
        assert rank.after_going_back.gradient_norms == rank.curve.gradient_norms[LATE]
        assert rank.same_after_going_back


@every_layout
def test_losses_and_norms_are_the_references(layout: Layout, facts: list[Facts]) -> None:
    """Each element counts once in the norm, whatever its padding; bf16 rounds each micro-batch's gradients."""
    expected = one_process(layout.precision)
    tolerance = 1e-6 if layout.precision is Precision.fp32 else 2e-2
    for rank in facts:
        assert reference.difference(rank.curve.losses, expected.losses) < tolerance
        assert reference.difference(rank.curve.gradient_norms, expected.gradient_norms) < tolerance
        assert rank.evaluations[0] == pytest.approx(expected.losses[0], rel=tolerance)
        assert rank.evaluations[1] < rank.evaluations[0]


@every_layout
def test_each_element_has_one_gradient(layout: Layout, facts: list[Facts]) -> None:
    held = [rank.gradient_elements for rank in facts]
    whole_model = RANKS if layout.stage == 0 else 1
    # A few elements (the embeddings of ids that weren't seen) have a gradient of zero.
    assert 0.9 * PARAMETERS * whole_model < sum(held) <= PARAMETERS * whole_model


def curves(layout: Layout, settings: list[dict[str, Any]]) -> list[Curve]:
    """The task: the same training under each of some settings of DeepSpeed."""
    return [train(make(layout, **setting), batches()[EARLY], MICRO_BATCH) for setting in settings]


@pytest.mark.parametrize(
    "layout",
    [Layout(1, Precision.fp32), Layout(2, Precision.bf16), Layout(2, Precision.fp32), Layout(3, Precision.bf16)],
    ids=str,
)
def test_overlap_and_bucket_sizes_change_no_bit(pool: Pool, layout: Layout) -> None:
    """On a GPU communication overlaps backward, with two buckets by turns: the same code runs here, in order."""
    settings = [{"overlap_comm": True}, {"overlap_comm": False, "reduce_bucket_size": 10**6}]
    for rank in pool.run(curves, ranks=RANKS, layout=layout, settings=settings):
        assert rank == [rank[0]] * len(settings)


REDUCTIONS = {"allreduce", "reduce_scatter_base"}


def reduced(layout: Layout, dtype: CommunicationDtype) -> tuple[int, float, set[torch.dtype]]:
    """The task: bytes in reductions of gradients, their norm, and what they add up in."""
    engine = make_engine(replace(layout.engine(), communication_dtype=dtype), layout.precision, MICRO_BATCH, MODEL)
    with Watch() as watch:
        stats = accumulate(engine, batches()[0])
    size = sum(size for name, size in watch.bytes.items() if name in REDUCTIONS)
    assert stats.gradient_norm is not None
    return size, float(stats.gradient_norm), {gradient.tensor.dtype for gradient in engine.gradients}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, Precision.bf16),
        Layout(2, Precision.fp32),
        Layout(3, Precision.bf16),
        Layout(FsdpShard.full, Precision.fp32),
    ],
    ids=str,
)
def test_gradients_reduced_in_bf16(pool: Pool, layout: Layout) -> None:
    """Half the bytes, rounded sums, and still added up in fp32."""
    found = [pool.run(reduced, ranks=RANKS, layout=layout, dtype=dtype)[0] for dtype in CommunicationDtype]
    (size, norm, dtypes), (rounded_size, rounded_norm, rounded_dtypes) = found
    assert rounded_size == pytest.approx(size / 2, rel=0.01)
    assert rounded_norm != norm
    assert rounded_norm == pytest.approx(norm, rel=1e-2)
    assert dtypes == rounded_dtypes == {torch.float32}


GATHERED = [Layout(0, Precision.fp32), Layout(3, Precision.bf16), Layout(FsdpShard.full, Precision.bf16)]


def gathered_weights(layout: Layout) -> list[bool]:
    """The task: parameters gathered between steps are whole, and gathering leaves no trace in training."""
    control, engine = make(layout), make(layout)
    found = []
    for step in range(3):
        weights = {name: p for name, p in parameters_of(engine).items() if "norm" in name or "mlp" in name}
        shapes = [p.shape for p in spec.parameters(MODEL) if p.name in weights]
        with engine.gathered(list(weights.values())) as whole:
            found.append([weight.shape for weight in whole] == shapes)
        found.append(train(engine, [batches()[step]], MICRO_BATCH) == train(control, [batches()[step]], MICRO_BATCH))
    return [*found, same(snapshot(engine), snapshot(control))]


@pytest.mark.parametrize("layout", GATHERED, ids=str)
def test_gathering_between_steps(pool: Pool, layout: Layout) -> None:
    assert all(all(rank) for rank in pool.run(gathered_weights, ranks=RANKS, layout=layout))


def test_one_process(pool: Pool) -> None:
    """All layouts on one rank: the numbers of the reference."""
    for stage in (0, 1, 2, 3, FsdpShard.full):
        (facts,) = pool.run(life, ranks=1, layout=Layout(stage, Precision.fp32))
        assert facts.shard_elements == PARAMETERS
        assert facts.same_as_control
        assert reference.difference(facts.curve.losses, one_process(Precision.fp32).losses) < 1e-6
        assert reference.difference(facts.curve.gradient_norms, one_process(Precision.fp32).gradient_norms) < 1e-6
