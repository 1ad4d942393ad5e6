"""What goes wrong without a word where a part of saving or loading is left out, and what sees it.

Each test leaves one thing out, by replacing the real one, and sees it: by the engine's comparison of weights with
masters before a save, by the refusal to commit a checkpoint, or by a curve that doesn't go on as it should. What sees
it is part of every save or of the matrix of layouts (test_checkpoint_layouts.py).

Elsewhere: masters that are looked up by DeepSpeed's mapping (test_weights_against_masters.py); ZeRO-0 in bf16, which
would step when it is built and is refused at start (test_exit_codes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatrain.config import Precision
from megatrain.engines import common, deepspeed_internals, ranges
from megatrain.engines.deepspeed_internals import Bf16Adapter, Stage3Adapter, ZeroAdapter
from megatrain.engines.fsdp import FsdpEngine
from megatrain.engines.ranges import MASTER, Shard
from megatrain.errors import GaveUp
from megatrain.model.partition import Part, Piece
from megatrain.model.transformer import Transformer
from tests import reference
from tests.distributed.checkpoint_matrix import OTHER_SEED, SAVED_STEP, Layout, Work, batches, write
from tests.distributed.engine_life import evaluate, zero_settings
from tests.distributed.pool import Pool
from tests.distributed.training import AnyEngine
from tests.engines.states import parameters_of, whole

pytestmark = pytest.mark.distributed

UNTIL = SAVED_STEP + 2


def nothing(*_: Any) -> None:
    """What stands in for what is left out."""


def without(owner: type, name: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, nothing)


def with_step_0() -> AbstractContextManager[Any]:
    create = common.create_state
    return mock.patch.object(common, "create_state", lambda optimizer, masters, _: create(optimizer, masters, 0))


OMISSIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "refresh at zero1 in bf16": without(Bf16Adapter, "after_load"),
    "refresh at zero2": without(ZeroAdapter, "after_load"),
    "refresh at zero3": without(Stage3Adapter, "after_load"),
    "prologue at zero3": without(Stage3Adapter, "before_load"),
    "reshard after an evaluation": without(FSDPModule, "reshard"),
    "step count": with_step_0,
}


@dataclass(frozen=True)
class Seen:
    """Of one rank: what the comparison said after the load, whether the first loss was right, how far any was off."""

    differing: str | None
    first_is_right: bool
    difference: float


def load_without(work: Work, omissions: Sequence[str]) -> dict[str, Seen]:
    """The task: in mid-training, right after an evaluation, an engine goes to where another one was.

    Once with nothing left out, which has to give the same bits; then with each omission. All weights of ZeRO-3 stay
    whole.
    """
    with zero_settings(stage3_param_persistence_threshold=10**6):
        other, engine = work.make(seed=0), work.make(OTHER_SEED)
    work.train(other, 0, 0, SAVED_STEP)
    saved = whole(other)
    expected = work.train(other, 0, SAVED_STEP, UNTIL)
    work.train(engine, OTHER_SEED, 0, 1)
    evaluate(engine, batches(0)[0])
    engine.load_shards(saved)
    assert engine.differing_weights() is None
    assert work.train(engine, 0, SAVED_STEP, UNTIL) == expected
    found = {}
    for omission in omissions:
        with OMISSIONS[omission]():
            evaluate(engine, batches(0)[0])
            engine.load_shards(saved)
        differing = engine.differing_weights()
        losses = work.train(engine, 0, SAVED_STEP, UNTIL).losses
        difference = reference.difference(losses, expected.losses)
        found[omission] = Seen(differing, losses[0] == expected.losses[0], difference)
    return found


@pytest.mark.parametrize(
    ("work", "omissions"),
    [
        (Work(Layout("zero1 dp2"), Precision.bf16), ["refresh at zero1 in bf16"]),
        (Work(Layout("zero2 dp2")), ["refresh at zero2", "step count"]),
        # Without the prologue, weights that stay whole keep their old values, since they are there already.
        (Work(Layout("zero3 dp2"), Precision.bf16), ["refresh at zero3", "prologue at zero3"]),
        (Work(Layout("fsdp-full dp2")), ["reshard after an evaluation", "step count"]),
    ],
    ids=str,
)
def test_what_a_load_leaves_out(pool: Pool, work: Work, omissions: list[str]) -> None:
    """A wrong step count shows one step later; FSDP has no weights to compare, but what an evaluation left gathered."""
    for rank in pool.run(load_without, ranks=2, work=work, omissions=omissions):
        for omission, seen in rank.items():
            assert seen.difference > 1e-3
            assert seen.first_is_right == (omission == "step count")
            assert (seen.differing is None) == (omission in ("step count", "reshard after an evaluation"))


def uncut() -> AbstractContextManager[Any]:
    """ZeRO-3's parts with what pads them; `shards_of`, which would leave it out too, without its cut."""

    def whole_part(name: str, part: Part, start: int, tensors: dict[str, Tensor], *_: int) -> Iterator[Shard]:
        yield Shard(name, part.shape, ((start, start + len(tensors[MASTER])),), tensors)

    both = ExitStack()
    both.enter_context(mock.patch.object(Stage3Adapter, "_real", lambda *arguments: arguments[-1]))
    both.enter_context(mock.patch.object(deepspeed_internals, "shards_of", whole_part))
    return both


def undivided() -> AbstractContextManager[Any]:
    """Every copy of a range as if it were the only one."""
    original = ranges.shards_of

    def alone(*arguments: Any) -> Iterator[Shard]:
        return (replace(shard, replica=0, replicas=1) for shard in original(*arguments))

    both = ExitStack()
    for owner in (deepspeed_internals, ranges):
        both.enter_context(mock.patch.object(owner, "shards_of", alone))
    return both


def save_with(work: Work, run_dir: Path, left_out: Callable[[], AbstractContextManager[Any]]) -> str:
    """The task: why an engine's state isn't saved."""
    engine = work.make(seed=0)
    with left_out():
        return refusal(engine, run_dir)


def refusal(engine: AnyEngine, run_dir: Path) -> str:
    """Why an engine's state isn't saved, on every rank; nothing is left of the attempt."""
    with pytest.raises(GaveUp) as error:
        write(engine, run_dir)
    assert list(run_dir.rglob("step_*")) == []
    return str(error.value)


@pytest.mark.parametrize(
    ("layout", "left_out", "why"),
    [
        ("zero3 dp3", uncut, "is no range"),
        ("zero0 dp2", undivided, "is held twice"),
        ("zero3 tp2", undivided, "is held twice"),
        ("fsdp-full replicate2 dp2", undivided, "is held twice"),
    ],
)
def test_ranges_that_are_not_the_whole_are_refused(
    pool: Pool, tmp_path: Path, layout: str, left_out: Callable[[], AbstractContextManager[Any]], why: str
) -> None:
    work = Work(Layout(layout))
    for said in pool.run(save_with, ranks=work.layout.ranks, work=work, run_dir=tmp_path, left_out=left_out):
        assert why in said


def save_by_attributes(work: Work, run_dir: Path) -> str:
    """The task: which part of a parameter this rank has is looked up at the parameter, where it stood before."""
    shard = FsdpEngine._shard

    def labelled(engine: FsdpEngine, module: Transformer) -> dict[nn.Module, FSDPModule]:
        for name, parameter in module.named_parameters():
            parameter.part = module.parts[name]  # type: ignore[attr-defined]
        return shard(engine, module)

    with mock.patch.object(FsdpEngine, "_shard", labelled):
        engine = work.make(seed=0)
    engine.parts = {
        name: getattr(parameter, "part", Part(tuple(parameter.shape), (Piece(0, parameter.numel()),)))
        for name, parameter in parameters_of(engine).items()
    }
    return refusal(engine, run_dir)


def test_what_stood_at_parameters_before_fully_shard_is_gone(pool: Pool, tmp_path: Path) -> None:
    """So what a rank has of a parameter is known by its name; by an attribute all would claim the whole."""
    for said in pool.run(save_by_attributes, ranks=2, work=Work(Layout("fsdp-full tp2")), run_dir=tmp_path):
        assert "is held twice" in said
