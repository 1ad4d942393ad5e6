"""What changes while a run goes on: phases, windows that are passed over, and starts in between."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data.loader import Loader, RankBatch
from megatrain.data.plan import Plan, every, settings
from megatrain.data.samples import SampleOrder, open_sources
from megatrain.data.state import State
from megatrain.data_config import DataConfig, PhaseConfig, SourceConfig
from megatrain.errors import InputError
from megatrain.objectives import build
from tests.data.sets import write_set

LENGTH, SIZE = 5, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "web", [[[100, 30], [50, 70]], [[200]]])
    write_set(folder / "books", [[[90, 40, 7]]])
    return folder


def config_of(folder: Path, **changes: object) -> TrainConfig:
    sources = {
        "web": SourceConfig(path=str(folder / "web"), weight=3.0),
        "books": SourceConfig(path=str(folder / "books"), weight=1.0),
    }
    data = DataConfig(sources=sources, pass_over=changes.pop("pass_over", []))  # type: ignore[arg-type]
    return TrainConfig(sequence_length=LENGTH, global_batch_size=SIZE, micro_batch_size=2, data=data, **changes)  # type: ignore[arg-type]


def plan_of(config: TrainConfig) -> Plan:
    return Plan(config, open_sources(config.data, config.sequence_length))


def run(
    plan: Plan, steps: int, state: State | None = None, step: int = 0, ranks: int = 1
) -> tuple[list[list[RankBatch]], State]:
    """The batches of each rank, and the state after the steps."""
    taken = []
    for rank in range(ranks):
        objective = build(ObjectiveConfig(), True)
        loader = Loader(plan, objective, state or plan.state(0), step=step, rank=rank, ranks=ranks)
        taken.append([next(loader) for _ in range(steps)])
        after = loader.state()
        loader.close()
    return taken, after


def digests(batches: list[list[RankBatch]]) -> list[int]:
    return [sum(parts) % (1 << 64) for parts in zip(*([b.digest for b in rank] for rank in batches), strict=True)]


PHASES = {
    "long": PhaseConfig(after_step=4, sequence_length=9, global_batch_size=4, micro_batch_size=1),
    "anneal": PhaseConfig(after_step=7, weights={"books": 5.0, "web": 0.0}),
}


def test_settings_add_up(folder: Path) -> None:
    config = config_of(folder, phases=PHASES)
    assert [settings(config, step).sequence_length for step in (0, 3, 4, 9)] == [5, 5, 9, 9]
    assert settings(config, 6).weights == {"web": 3.0, "books": 1.0}
    assert settings(config, 7).weights == {"web": 0.0, "books": 5.0}
    assert settings(config, 7).phases == ("long", "anneal")
    assert [(each.sequence_length, each.global_batch_size) for each in every(config)] == [(5, 8), (9, 4), (9, 4)]


def test_a_phase_that_cannot_be_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^phases\.x\.weights\.code=1\.0: legal: \['web', 'books'\]"):
        settings(config_of(folder, phases={"x": PhaseConfig(after_step=1, weights={"code": 1.0})}), 0)
    with pytest.raises(InputError, match=r"^phases\.x\.sequence_length=0: legal: 1 or more"):
        settings(config_of(folder, phases={"x": PhaseConfig(after_step=1, sequence_length=0)}), 0)


def test_each_phase_is_a_segment(folder: Path) -> None:
    (batches,), state = run(plan_of(config_of(folder, phases=PHASES)), 9)
    assert [batch.sequence_length for batch in batches] == [5] * 4 + [9] * 5
    assert [batch.samples for batch in batches] == [8] * 4 + [4] * 5
    assert [batch.micro_batches[0].input_ids.shape for batch in batches[3:5]] == [(2, 5), (1, 9)]
    assert [batch.tokens for batch in batches] == [40, 80, 120, 160, 196, 232, 268, 304, 340]
    assert [(segment["from_sample"], segment["reason"]) for segment in state["segments"]] == [
        (0, "start"),
        (32, "phase long"),
        (44, "phase anneal"),
    ]
    assert [[segment["reason"] for segment in batch.begun] for batch in batches] == [
        *[[] for _ in range(4)],
        ["phase long"],
        [],
        [],
        ["phase anneal"],
        [],
    ]
    # Sources are numbered by name: only books from the last phase on.
    assert {int(source) for batch in batches[7:] for part in batch.micro_batches for source in part.source} == {0}


def test_a_phase_of_another_micro_batch_size_alone_is_no_segment(folder: Path) -> None:
    phases = {"small": PhaseConfig(after_step=2, micro_batch_size=1)}
    (batches,), state = run(plan_of(config_of(folder, phases=phases)), 4)
    assert [[len(part.input_ids) for part in batch.micro_batches] for batch in batches] == [[2] * 4] * 2 + [[1] * 8] * 2
    assert len(state["segments"]) == 1
    (plain,), _ = run(plan_of(config_of(folder)), 4)
    assert digests([batches]) == digests([plain])


def test_a_source_goes_on_where_it_was_when_only_weights_change(folder: Path) -> None:
    phases = {"other": PhaseConfig(after_step=3, weights={"web": 1.0, "books": 1.0})}
    plan = plan_of(config_of(folder, phases=phases))
    _, state = run(plan, 5)
    orders = [SampleOrder(plan.sources(LENGTH), 0, segment) for segment in state["segments"]]
    located = [orders[0].locate(np.arange(24)), orders[1].locate(np.arange(24, 90))]
    seen = Counter((int(s), int(n)) for part in located for s, n in zip(*part, strict=True))
    for number, source in enumerate(plan.sources(LENGTH)):
        counts = [seen[number, sample] for sample in range(source.index.samples)]
        assert max(counts) - min(counts) <= 1, "no sample twice before all were seen"


def test_a_window_is_passed_over_by_whole_steps(folder: Path) -> None:
    plan = plan_of(config_of(folder, pass_over=[[18, 29]]))
    (batches,), state = run(plan, 4)
    assert [(batch.first, batch.last) for batch in batches] == [(0, 7), (8, 15), (30, 37), (38, 45)]
    assert [batch.tokens for batch in batches] == [40, 80, 120, 160]
    assert state["segments"][1]["passed_over"] == [16, 29]
    (plain,), _ = run(plan_of(config_of(folder)), 6)
    order = SampleOrder(plan.sources(LENGTH), 0)
    skipping = SampleOrder(plan.sources(LENGTH), 0, state["segments"][1])
    n = np.arange(30, 60)
    assert np.array_equal(np.stack(order.locate(n)), np.stack(skipping.locate(n))), "the samples after it are the same"
    assert digests([batches[:2]]) == digests([plain[:2]])


def test_going_back_passes_over_what_came_since(folder: Path) -> None:
    """Five steps were trained; two count, and the samples of the other three are left out."""
    plan = plan_of(config_of(folder, phases={"wide": PhaseConfig(after_step=3, global_batch_size=12)}))
    _, saved = run(plan, 2)
    loader = Loader(plan, build(ObjectiveConfig(), True), saved, step=2)
    trained = [next(loader) for _ in range(3)]
    loader = loader.go_back(saved, step=2, until=trained[-1].last, reason="loss nan")
    state = loader.state()
    assert (state["n"], state["segments"][:-1]) == (48, saved["segments"])
    assert state["segments"][-1]["passed_over"] == [16, 47]
    assert state["segments"][-1]["reason"] == "loss nan"
    again = [next(loader) for _ in range(3)]
    loader.close()
    assert [(batch.first, batch.last, batch.tokens) for batch in again] == [(48, 55, 120), (56, 67, 180), (68, 79, 240)]
    (batches,), _ = run(plan, 3, state, step=2)
    assert digests([again]) == digests([batches])


@examples(max_examples=25, deadline=None)
@given(
    stop=st.integers(1, 11),
    ranks=st.sampled_from([1, 2, 4]),
    window=st.none() | st.tuples(st.integers(0, 60), st.integers(0, 20)),
    starts=st.tuples(st.integers(1, 10), st.integers(1, 10)),
)
def test_stopped_anywhere_it_goes_on_with_the_same_batches(
    folder: Path, stop: int, ranks: int, window: tuple[int, int] | None, starts: tuple[int, int]
) -> None:
    phases = {
        "long": PhaseConfig(after_step=starts[0], sequence_length=9, global_batch_size=4),
        "anneal": PhaseConfig(after_step=starts[1], weights={"books": 5.0}, global_batch_size=12),
    }
    windows = [] if window is None else [[window[0], window[0] + window[1]]]
    config = config_of(folder, phases=phases, pass_over=windows)
    whole, end = run(plan_of(config), 12)
    first, state = run(plan_of(config), stop, ranks=ranks)
    plan = plan_of(config)
    second, after = run(plan, 12 - stop, plan.resume(state, stop), step=stop) if stop < 12 else ([], state)
    assert digests(first) + digests(second) == digests(whole)
    assert after == end
