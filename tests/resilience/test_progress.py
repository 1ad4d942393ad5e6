"""Each sign of progress is a new place, in the order of a step; telling costs next to nothing."""

from __future__ import annotations

import timeit

from megatrain.resilience.progress import PHASES, Place, Progress


def test_the_places_of_a_run_are_in_order() -> None:
    progress, orders = Progress(), []
    for step in (1, 2):
        for phase in PHASES:
            progress.at(step, phase)
            orders.append(progress.place.order)
            orders += [progress.place.order for _ in progress.parts("ab")]
    assert orders == sorted(set(orders))


def test_pieces_are_progress_at_the_same_place() -> None:
    progress = Progress()
    progress.at(3, "save")
    before = progress.place
    for _ in progress.pieces("ab"):
        assert progress.place == Place(3, "save", 0)
        assert progress.place is not before
        before = progress.place


def test_who_waits_for_a_meeting_is_ahead_of_who_still_works() -> None:
    progress, waiting = Progress(), []

    def agree(failure: str | None) -> str | None:
        waiting.append(progress.place.part)
        return failure

    meet = progress.meeting(agree)
    progress.at(3, "save")
    assert (meet(None), meet("full"), progress.place.part) == (None, "full", 4)
    assert waiting == [1, 3]


def test_steps_done_are_those_whose_update_is_over() -> None:
    done = [Place(4, phase).steps_done for phase in PHASES]
    assert done == [3, 3, 3, 4, 4, 4, 4]


def test_telling_costs_microseconds() -> None:
    progress = Progress()
    assert min(timeit.repeat(lambda: progress.at(1, "data"), number=1000, repeat=5)) / 1000 < 20e-6
