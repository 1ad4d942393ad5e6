"""Who is named: the silent rank, the one that is behind, or honestly none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.resilience.beats import FIRST_STEP, SILENT_BEATS, Beat, Beats
from megatrain.resilience.collectives import GroupRecord, Operation
from megatrain.resilience.progress import PHASES, Place

HOME = ("node-a", 1)
HEARTBEAT, TIMEOUT, STEP = 1.0, 10.0, 7
HERE = Place(STEP, "accumulate")


def beat(number: int, place: Place = HERE, standing: float = 0.0, leaving: bool = False, pid: int = 0) -> Beat:
    return Beat(number, *HOME, pid or os.getpid(), place, standing, leaving)


def observed(*history: dict[int, Beat], world_size: int = 3, first_step: int = 1) -> Beats:
    """What was seen at second 0, 1, 2, ..."""
    beats = Beats(world_size, HOME, HEARTBEAT, TIMEOUT, first_step)
    for second, said in enumerate(history):
        beats.take({rank: each.encode().encode() for rank, each in said.items()}, second)
    return beats


def standing(*places: Place, seconds: float = TIMEOUT + 1) -> dict[int, Beat]:
    return {rank: beat(1, place, seconds) for rank, place in enumerate(places)}


def test_ranks_that_beat_and_move_are_well() -> None:
    beats = observed(*({rank: beat(second) for rank in range(3)} for second in range(30)))
    assert beats.verdict(30, communication_failed=False) is None
    assert beats.verdict(30, communication_failed=True) is None
    assert beats.gone() is None


def test_a_silent_rank_is_named_when_the_timeout_is_over() -> None:
    beats = observed(*({rank: beat(second) for rank in range(3) if rank != 1 or second < 5} for second in range(15)))
    assert beats.verdict(4 + TIMEOUT, communication_failed=False) is None
    assert beats.verdict(4.1 + TIMEOUT, communication_failed=False) == (
        "rank 1 (node-a) gave no sign of life for 10 s, last seen computing step 7: "
        "process or node dead, stopped or cut off"
    )


def test_where_all_stand_still_silence_explains_it_before_it_is_over() -> None:
    said = [{rank: beat(s, HERE, s) for rank in range(3) if rank != 1 or s <= 1} for s in range(12)]
    reason = observed(*said).verdict(11, communication_failed=False)
    assert reason is not None
    assert reason.startswith("rank 1 (node-a) gave no sign of life for 10 s")


def test_a_rank_that_never_began_is_named() -> None:
    beats = observed(*({0: beat(s), 2: beat(s)} for s in range(31)))
    assert beats.verdict(FIRST_STEP * TIMEOUT, communication_failed=False) is None
    assert beats.verdict(31, communication_failed=False) == (
        "rank 1 gave no sign of life for 31 s, and never began to train: process or node dead, stopped or cut off"
    )


@pytest.mark.parametrize(
    ("behind", "doing", "cause"),
    [
        (Place(STEP, "data"), "reading data for step 7", "storage"),
        (Place(STEP - 2, "metrics"), "waiting for the metrics of step 5", "the device, or code that doesn't return"),
        (Place(STEP - 1, "save", 2), "saving step 6", "storage"),
        (Place(STEP - 1, "evaluate", 4), "evaluating after step 6", "the device, or code that doesn't return"),
    ],
)
def test_the_rank_that_is_behind_is_named(behind: Place, doing: str, cause: str) -> None:
    beats = observed(standing(HERE, HERE, behind))
    assert beats.verdict(0, communication_failed=False) == (
        f"rank 2 (node-a) hung {doing} for 11 s; the others waited, up to computing step 7; likely {cause}"
    )


def test_parts_of_a_phase_count() -> None:
    beats = observed(standing(Place(6, "save", 3), Place(6, "save", 2), Place(6, "save", 3)))
    reason = beats.verdict(0, communication_failed=False)
    assert (
        reason == "rank 1 (node-a) hung saving step 6 for 11 s; the others waited, up to saving step 6; likely storage"
    )


def test_none_is_blamed_where_all_stand_at_the_same_place() -> None:
    beats = observed(standing(HERE, HERE, HERE))
    reason = beats.verdict(0, communication_failed=False)
    assert reason == "all 3 ranks have been computing step 7 for 11 s, none is behind the others"


WAITS = Operation("all_gather", 12, 64)
ALL, DATA = GroupRecord("0", 0, "", 3, 12, WAITS), GroupRecord("4", 0, "data-parallel", 2, 12, WAITS)


def explained(*records: GroupRecord, places: Sequence[Place] = (HERE, HERE, HERE)) -> str | None:
    """The sentence where all ranks stand still and the recorder of each has said one thing."""
    said = {rank: replace(beat, records=(records[rank],)) for rank, beat in standing(*places).items()}
    return observed(said).verdict(0, communication_failed=False)


def test_who_has_not_entered_what_the_others_wait_in_is_named() -> None:
    late = replace(ALL, entered=11, waiting=None)
    assert explained(ALL, late, ALL) == (
        "rank 1 (node-a) hung computing step 7 for 11 s; the others waited, in all_gather 12 of all ranks; "
        "likely the device, or code that doesn't return"
    )
    assert explained(ALL, late, ALL, places=(HERE, Place(STEP, "data"), HERE)) == (
        "rank 1 (node-a) hung reading data for step 7 for 11 s; the others waited, up to computing step 7, "
        "in all_gather 12 of all ranks; likely storage"
    )


def test_of_those_that_are_waited_for_the_one_behind_is_named() -> None:
    late = replace(ALL, entered=11, waiting=None)
    reason = explained(ALL, late, late, places=(HERE, Place(STEP - 1, "save"), Place(STEP - 1, "data")))
    assert reason is not None
    assert reason.startswith(
        "rank 2 (node-a) hung reading data for step 6 for 11 s; the others waited, up to computing"
    )


def test_a_collective_that_all_have_entered_is_blamed_on_none() -> None:
    cause = "computing step 7; likely a link, a network card or a GPU"
    assert (
        explained(ALL, ALL, ALL)
        == f"all_gather 12 of all ranks, which all of them have entered, hung for 11 s, {cause}"
    )
    other = GroupRecord("5", 1, "data-parallel", 1, 3, None)
    assert explained(DATA, other, DATA) == (
        f"all_gather 12 of data-parallel ranks 0, 2 (node-a), which all of them have entered, hung for 11 s, {cause}"
    )


def test_a_receive_that_was_sent_is_blamed_on_none() -> None:
    group = GroupRecord("5", 0, "pipeline", 3, 0, None)
    receives, sends = (replace(group, waiting=Operation(*each)) for each in (("recv", 0, 8, 1), ("send", 0, 8, 0)))
    reason = explained(receives, sends, group)
    assert reason is not None
    assert reason.startswith("recv between pipeline ranks 0, 1 (node-a), which all of them have entered, hung ")


def test_different_collectives_are_told_apart() -> None:
    other = replace(ALL, waiting=Operation("all_reduce", 12, 2))
    assert explained(ALL, other, ALL) == (
        "ranks wait in different collectives for 11 s, computing step 7: "
        "ranks 0, 2 (node-a) in all_gather 12 of all ranks (group 0, 64 elements), "
        "rank 1 (node-a) in all_reduce 12 of all ranks (group 0, 2 elements); likely a bug in their order"
    )


def test_recorders_are_asked_once_a_rank_has_stood_still_for_long() -> None:
    for seconds, stalled in ((TIMEOUT / 2, False), (TIMEOUT / 2 + 0.1, True)):
        assert observed({0: beat(1), 1: beat(1, standing=seconds), 2: beat(1)}).stalled() == stalled


def test_a_single_rank_is_named() -> None:
    beats = observed(standing(Place(STEP, "data")), world_size=1)
    reason = beats.verdict(0, communication_failed=False)
    assert reason == "rank 0 (node-a) hung reading data for step 7 for 11 s; likely storage"


def test_of_many_ranks_some_are_named() -> None:
    places = [Place(STEP, "data")] * 20 + [HERE]
    reason = observed(standing(*places), world_size=21).verdict(0, communication_failed=False)
    assert reason is not None
    assert reason.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more (node-a) hung reading data for step 7")


def test_the_first_step_of_a_start_may_take_longer() -> None:
    def reason(seconds: float) -> str | None:
        return observed(standing(HERE, HERE, HERE, seconds=seconds), first_step=STEP).verdict(0, False)

    assert reason(FIRST_STEP * TIMEOUT) is None
    assert reason(FIRST_STEP * TIMEOUT + 1) is not None


def test_a_rank_that_left_is_not_missed() -> None:
    beats = observed(
        {0: beat(1), 1: beat(1), 2: beat(1, leaving=True, pid=2**30)}, *({0: beat(s), 1: beat(s)} for s in range(2, 50))
    )
    assert beats.verdict(50, communication_failed=False) is None
    assert beats.verdict(50, communication_failed=True) is None
    assert beats.gone() is None


def test_once_communication_failed_a_few_missed_beats_are_enough() -> None:
    beats = observed(*({rank: beat(s) for rank in range(3) if rank != 1 or s < 5} for s in range(9)))
    assert beats.verdict(4 + SILENT_BEATS, communication_failed=True) is None
    reason = beats.verdict(4.5 + SILENT_BEATS, communication_failed=True)
    assert reason is not None
    assert reason.startswith("rank 1 (node-a) gave no sign of life for 4 s")


def test_a_process_that_ended_without_a_word_is_named_at_once() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(20)
    beats = observed({0: beat(1), 1: beat(1, pid=ended.pid), 2: beat(1)})
    assert beats.gone() == "rank 1 (node-a) died, last seen computing step 7"
    beats.home = ("node-b", 1)
    assert beats.gone() is None


places = st.builds(Place, st.integers(5, 7), st.sampled_from(list(PHASES)), st.integers(0, 2))


@given(st.lists(places, min_size=2, max_size=6))
def test_named_are_exactly_those_at_the_least_place(chosen: list[Place]) -> None:
    reason = observed(standing(*chosen), world_size=len(chosen)).verdict(0, communication_failed=False)
    assert reason is not None
    least = min(place.order for place in chosen)
    behind = [str(rank) for rank, place in enumerate(chosen) if place.order == least]
    if len(behind) == len(chosen):
        assert reason.startswith(f"all {len(chosen)} ranks have been ")
    else:
        assert reason.startswith(f"rank{'s' * (len(behind) > 1)} {', '.join(behind)} (node-a) hung ")


@given(places, st.floats(0, 1e6), st.booleans(), st.lists(st.sampled_from([ALL, DATA, replace(DATA, waiting=None)])))
def test_a_beat_arrives_as_it_was_sent(place: Place, seconds: float, leaving: bool, said: list[GroupRecord]) -> None:
    sent = replace(beat(3, place, seconds, leaving), records=tuple(said))
    assert Beat.decode(sent.encode().encode()) == sent
