"""Law 2: the loader gives the samples of tests/reference_order.py, whatever the ranks, micro-batches and resumes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config import ObjectiveConfig, TrainConfig
from megatrain.data.loader import Loader
from megatrain.data.plan import Plan
from megatrain.data.samples import SampleOrder, open_sources
from megatrain.data.state import State
from megatrain.data_config import DataConfig, Packing, PhaseConfig, SourceConfig
from megatrain.objectives import build
from tests.data.sets import EOS, Shards, documents, write_set
from tests.reference_order import Asked, ReferenceOrder, ReferenceRun, ReferenceSource


@dataclass(frozen=True)
class Case:
    """A run's data: shards by source, weights, limits, and what else the order is a function of."""

    shards: dict[str, Shards]
    weights: dict[str, float]
    max_epochs: dict[str, float | None]
    seed: int
    sequence_length: int
    shuffle_block: int | None
    shuffle_blocks: int
    packing: Packing

    def config(self, folder: Path) -> TrainConfig:
        """With each source's set in the folder of its name."""
        sources = {
            name: SourceConfig(str(folder / name), self.weights[name], self.max_epochs[name]) for name in self.shards
        }
        data = DataConfig(
            sources=sources,
            shuffle_block=self.shuffle_block,
            shuffle_blocks=self.shuffle_blocks,
            packing=self.packing,
        )
        return TrainConfig(seed=self.seed, sequence_length=self.sequence_length, data=data)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to three sources; at the shorter lengths with several pack units a shard."""
    names = draw(st.lists(st.sampled_from(["a", "b", "ü"]), min_size=1, max_size=3, unique=True))
    document = st.one_of(st.integers(1, 30), st.integers(250, 800))
    member = st.lists(document, min_size=1, max_size=4)
    shards = st.lists(st.lists(member, min_size=1, max_size=3), min_size=1, max_size=3)
    return Case(
        shards={name: [[[2]], *draw(shards)] for name in names},
        weights={name: draw(st.sampled_from([1.0, 0.3, 7.0, 1e-3])) for name in names},
        max_epochs={name: draw(st.sampled_from([None, 0.5, 1.0, 2.3])) for name in names},
        seed=draw(st.integers(0, 2**31)),
        sequence_length=draw(st.sampled_from([1, 2, 7, 64])),
        shuffle_block=draw(st.sampled_from([None, None, 1, 5, 64])),
        shuffle_blocks=draw(st.integers(1, 6)),
        packing=draw(st.sampled_from(Packing)),
    )


@contextmanager
def opened(case: Case) -> Iterator[tuple[TrainConfig, SampleOrder, ReferenceOrder]]:
    """The configuration of the case, its order, and the reference's."""
    with tempfile.TemporaryDirectory() as name:
        sets = {source: write_set(Path(name, source), shards) for source, shards in case.shards.items()}
        config = case.config(Path(name))
        reference = ReferenceOrder(
            {
                source: ReferenceSource(documents(shards), case.weights[source], case.max_epochs[source])
                for source, shards in sets.items()
            },
            case.seed,
            case.sequence_length,
            eos=EOS,
            packing=case.packing.value,
            shuffle_block=case.shuffle_block,
            shuffle_blocks=case.shuffle_blocks,
        )
        yield config, SampleOrder(open_sources(config.data, case.sequence_length), case.seed), reference


@settings(max_examples=40, deadline=None)
@given(case=cases(), first=st.one_of(st.integers(0, 50), st.integers(0, 5000)))
def test_samples_are_those_of_the_reference(case: Case, first: int) -> None:
    with opened(case) as (_, order, reference):
        names = [source.name for source in order.sources]
        assert {source.name: source.index.samples for source in order.sources} == reference.samples
        end = order.total_samples or 2**62
        n = np.arange(min(first, end - 1), min(first + 20, end))
        raw = order.read(n)
        _, numbers = order.locate(n)
        for row, expected in enumerate(map(reference.sample, n.tolist())):
            assert names[raw.source[row]] == expected.source
            assert numbers[row] == expected.number
            assert tuple(raw.ids[row].tolist()) == expected.ids
            assert tuple(raw.document[row].tolist()) == expected.document
            assert raw.length[row] == expected.length


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_the_last_samples_are_those_of_the_reference(case: Case) -> None:
    """The phases of the mixture, to the last sample: each source gives as many as it may."""
    if None in case.max_epochs.values():
        case = replace(case, max_epochs=dict.fromkeys(case.shards, 1.0))
    with opened(case) as (_, order, reference):
        assert order.total_samples is not None
        n = np.arange(max(0, order.total_samples - 40), order.total_samples)
        source, number = order.locate(n)
        found = [(order.sources[s].name, x) for s, x in zip(source.tolist(), number.tolist(), strict=True)]
        expected = [reference.sample(each) for each in n.tolist()]
        assert found == [(sample.source, sample.number) for sample in expected]


def digests(plan: Plan, state: State, step: int, steps: int, ranks: int) -> tuple[list[int], State]:
    """batch_digest of the next steps, at most, of so many ranks; the state after them, which is that of every rank."""
    objective = build(ObjectiveConfig(), document_mask=True)
    parts, states = [], []
    for rank in range(ranks):
        loader = Loader(plan, objective, state, step=step, rank=rank, ranks=ranks)
        parts.append([batch.digest for batch in islice(loader, steps)])
        states.append(loader.state())
        loader.close()
    assert all(each == states[0] for each in states)
    return [sum(step) % 2**64 for step in zip(*parts, strict=True)], states[0]


Part = tuple[int, int, int, int]
"""A part of a run between two starts: steps, ranks, micro-batch size and prefetch."""
PARTS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=20, deadline=None)
@given(case=cases(), global_batch_size=st.integers(1, 17), parts=PARTS)
def test_digests_are_the_same_for_any_ranks_and_resumes(case: Case, global_batch_size: int, parts: list[Part]) -> None:
    with opened(case) as (config, order, reference):
        state: State | None = None
        found: list[int] = []
        for steps, ranks, micro_batch_size, prefetch in parts:
            data = replace(config.data, prefetch=prefetch)
            config = replace(config, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, data=data)
            plan = Plan(config, order.sources)
            state = plan.state(0) if state is None else plan.resume(state, len(found))
            more, state = digests(plan, state, len(found), steps, ranks)
            found += more
        total = order.total_samples or 2**62
        firsts = [step * global_batch_size for step in range(len(found))]
        expected = [reference.batch_digest(first, min(global_batch_size, total - first)) for first in firsts]
        assert found == expected
        assert len(found) == min(sum(steps for steps, *_ in parts), -(-total // global_batch_size))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Case, list[PhaseConfig], list[list[int]], str | None]:
    """A case, its phases, windows of samples to pass over, and the source that joins with the second part of a run."""
    case = draw(cases())
    first, *others = sorted(case.shards)
    joins = draw(st.booleans())
    late = others.pop() if others and joins else None
    phase = st.builds(
        PhaseConfig,
        after_step=st.integers(1, 8),
        weights=st.fixed_dictionaries(
            {}, optional={first: st.sampled_from([0.2, 1.0])} | dict.fromkeys(others, st.sampled_from([0.0, 1.0, 3.0]))
        ),
        sequence_length=st.sampled_from([None, 1, 7, 20]),
        global_batch_size=st.none() | st.integers(1, 17),
    )
    window = st.tuples(st.integers(0, 80), st.integers(0, 30)).map(lambda pair: [pair[0], sum(pair)])
    return case, draw(st.lists(phase, max_size=3)), draw(st.lists(window, max_size=2)), late


def asked(reference: ReferenceOrder, size: int, phases: Sequence[PhaseConfig], without: str | None, step: int) -> Asked:
    """What the step that follows `step` steps is asked to train on. reference: has the sources and how they are cut."""
    sources = {name: source for name, source in reference.sources.items() if name != without}
    length = reference.length
    for phase in sorted((phase for phase in phases if phase.after_step <= step), key=lambda phase: phase.after_step):
        sources |= {name: replace(sources[name], weight=weight) for name, weight in phase.weights.items()}
        length, size = phase.sequence_length or length, phase.global_batch_size or size
    return Asked(sources, length, size, reference.packing, reference.block, reference.blocks)


@pytest.mark.timeout(600)
@settings(max_examples=20, deadline=None)
@given(drawn=changes(), size=st.integers(1, 17), parts=PARTS)
def test_digests_are_the_same_over_segments(
    drawn: tuple[Case, list[PhaseConfig], list[list[int]], str | None], size: int, parts: list[Part]
) -> None:
    """Other weights, lengths and batches, samples that are passed over, and a source more when it is continued."""
    case, phases, windows, late = drawn
    with opened(case) as (config, _, reference):
        state: State | None = None
        found: list[int] = []
        expected: list[int] = []
        run = ReferenceRun(
            asked(reference, size, phases, late, 0), case.seed, eos=EOS, pass_over=[(a, b) for a, b in windows]
        )
        for number, (steps, ranks, micro_batch_size, prefetch) in enumerate(parts):
            absent = late if number == 0 else None
            sources = {name: source for name, source in config.data.sources.items() if name != absent}
            now = replace(
                config,
                global_batch_size=size,
                micro_batch_size=micro_batch_size,
                phases={str(place): phase for place, phase in enumerate(phases)},
                data=replace(
                    config.data, sources=sources, prefetch=prefetch, pass_over=windows, allow_change=number == 1
                ),
            )
            plan = Plan(now, open_sources(now.data, now.sequence_length))
            step = len(found)
            state = plan.state(0) if state is None else plan.resume(state, step)
            run.change(asked(reference, size, phases, absent, max(0, step - 1)))
            more, state = digests(plan, state, step, steps, ranks)
            found += more
            for each in range(step, step + steps):
                ahead = copy(run)
                ahead.change(asked(reference, size, phases, absent, each))
                if (trained := ahead.step()) is None:
                    break
                expected.append(trained[1])
                run = ahead
            assert found == expected
            assert state["n"] == run.n
