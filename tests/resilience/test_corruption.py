"""Who is named when ranks that should hold the same don't, and when: over a real store."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatrain.resilience.corruption import SLOTS, Comparison, judge
from tests.resilience.stores import tcp_stores

RANKS = 4


def held(*hashes: str, what: str = "weights") -> dict[int, tuple[str, dict[str, str]]]:
    return {rank: ("node", {what: each}) for rank, each in enumerate(hashes)}


def test_ranks_that_agree_are_well() -> None:
    assert judge(held("a", "a", "a")) is None
    assert judge(held("a") | {1: ("node", {"other": "b"})}) is None


def test_the_minority_is_named() -> None:
    assert judge(held("a", "b", "a")) == "rank 1 (node): weights differs from what 2 other ranks hold"
    assert judge(held("a", "b", "a", "c", "a")) == (
        "rank 1 (node), rank 3 (node): weights differs from what 3 other ranks hold"
    )


def test_of_two_both_are_named() -> None:
    assert judge(held("a", "b")) == (
        "rank 0 (node), rank 1 (node): weights should be the same on all of them and isn't; "
        "which one is right can't be told"
    )


@given(st.integers(3, 20), st.data())
def test_any_single_rank_is_found_in_any_thing(ranks: int, data: st.DataObject) -> None:
    one = data.draw(st.integers(0, ranks - 1))
    all_held = {rank: (f"node-{rank}", {"x": "same", "y": "no" if rank == one else "yes"}) for rank in range(ranks)}
    assert judge(all_held) == f"rank {one} (node-{one}): y differs from what {ranks - 1} other ranks hold"


def test_rounds_are_judged_when_all_have_told_and_the_store_does_not_grow() -> None:
    stores = tcp_stores(RANKS)
    each = [Comparison(stores[rank], "1", rank, RANKS, f"node-{rank}") for rank in range(RANKS)]
    rounds = 3 * SLOTS
    for number in range(rounds):
        for rank in reversed(range(RANKS)):
            assert each[0].verdict() is None
            wrong = number == rounds - 1 and rank == 2
            each[rank].tell(10 * number, {"weights": f"{number}{wrong}"})
        if number < rounds - 1:
            assert each[0].verdict() is None
            assert each[0].agreed_after == 10 * number
    assert each[0].verdict() == (
        f"rank 2 (node-2): weights differs from what 3 other ranks hold, after step {10 * (rounds - 1)}; "
        f"all agreed after step {10 * (rounds - 2)}"
    )
    assert stores[0].num_keys() <= SLOTS * (RANKS + 1) + 2
