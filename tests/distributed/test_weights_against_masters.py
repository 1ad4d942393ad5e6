"""Before a save each rank holds its weights against its masters: any difference is seen, and seen as what it is.

That none is seen where all is right, test_engine.py and test_checkpoint_layouts.py have in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from torch import Tensor, nn

from megatrain.config import Precision
from megatrain.engines.deepspeed_internals import ZeroAdapter
from megatrain.engines.ranges import MASTER
from tests.distributed.checkpoint_matrix import SAVED_STEP, Layout, Work
from tests.distributed.engine_life import zero_settings
from tests.distributed.pool import Pool
from tests.distributed.training import AnyEngine, Curve
from tests.engines.states import parameters_of

pytestmark = pytest.mark.distributed

bf16 = Precision.bf16
Named = dict[tuple[str, int], bool]
"""By a tensor and its element, the first or the last: whether a change of it was seen as the parameter's."""


def change(work: Work) -> tuple[Named, Named]:
    """The task: what is seen on this rank of changed masters, and of changed weights."""
    engine = work.make(seed=0)
    work.train(engine, 0, 0, 1)
    masters: Named = {}
    weights: Named = {}
    for shard in engine.shards():
        masters |= named(engine, shard.name, f"{shard.name} {shard.ranges}", shard.tensors[MASTER])
    for name, parameter in parameters_of(engine).items():
        if parameter.numel():
            weights |= named(engine, name, name, parameter.detach().view(-1))
        if hasattr(parameter, "ds_tensor"):
            weights |= named(engine, name, f"part of {name}", parameter.ds_tensor.detach())
    return masters, weights


def named(engine: AnyEngine, parameter: str, what: str, tensor: Tensor) -> Named:
    """Changes an element of `tensor` and puts it back."""
    found = {}
    for element in (0, -1):
        value = tensor[element].clone()
        tensor[element] += 1
        found[what, element] = engine.differing_weights() == parameter
        tensor[element] = value
    assert engine.differing_weights() is None
    return found


@pytest.mark.parametrize(
    "work",
    [
        Work(Layout("zero1 dp2"), bf16, "tied"),
        Work(Layout("zero2-offload dp2"), bf16, "biases"),
        Work(Layout("zero2 tp2"), Precision.fp64),
        Work(Layout("zero3 dp2"), bf16),
        Work(Layout("zero3-offload interleaved pp2"), bf16),
    ],
    ids=str,
)
def test_any_changed_master_or_weight_is_named(pool: Pool, work: Work) -> None:
    """A weight that both ranks have is compared by the one that steps it."""
    ranks = pool.run(change, ranks=2, work=work)
    for masters, _ in ranks:
        assert set(masters.values()) == {True}
    of_ranks = [weights for _, weights in ranks]
    elements = {element for weights in of_ranks for element in weights}
    assert len(elements) >= 2 * 20
    assert {element for element in elements if any(weights.get(element) for weights in of_ranks)} == elements


def by_hp_mapping(adapter: ZeroAdapter) -> Iterator[tuple[nn.Parameter, int, Tensor, int, int]]:
    """ZeroAdapter.pieces as DeepSpeed's own mapping has it."""
    for parameter in adapter.names:
        if (found := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            weights, masters = found.lp_fragment_address, found.hp_fragment_address
            flat = adapter.flats()[found.param_group_index]
            yield parameter, weights.start, flat, masters.start, masters.start + masters.numel


def with_pieces(work: Work, pieces: Callable[[ZeroAdapter], Any]) -> tuple[str | None, Curve]:
    """The task: what the comparison says of an engine with round_robin_gradients, and its curve."""
    with zero_settings(round_robin_gradients=True), mock.patch.object(ZeroAdapter, "pieces", pieces):
        engine = work.make(seed=0)
        return engine.differing_weights(), work.train(engine, 0, 0, SAVED_STEP)


def test_pieces_by_hp_mapping_are_the_wrong_elements(pool: Pool) -> None:
    work = Work(Layout("zero2 dp2"))
    right, expected = pool.run(with_pieces, ranks=2, work=work, pieces=ZeroAdapter.pieces)[0]
    wrong, curve = pool.run(with_pieces, ranks=2, work=work, pieces=by_hp_mapping)[0]
    assert right is None
    assert wrong is not None
    assert curve != expected
