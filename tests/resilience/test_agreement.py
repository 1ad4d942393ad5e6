"""Ranks agree over a real store whether all is well."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError

from megatrain.resilience.agreement import Agreement, Notices
from tests.resilience.stores import tcp_stores

RANKS = 3


def test_all_ranks_get_the_same_answer_in_every_round() -> None:
    stores = tcp_stores(RANKS)
    rounds = [(None, None, None), (None, "rank 1: full", None), (None, None, None), ("rank 0: a", "", "rank 2: b")]

    def rank_main(rank: int) -> list[str | None]:
        agree = Agreement(stores[rank], RANKS, "test")
        return [agree(said[rank] or None) for said in rounds]

    with ThreadPoolExecutor(RANKS) as ranks:
        answers = list(ranks.map(rank_main, range(RANKS)))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][:3] == [None, "rank 1: full", None]
    assert answers[0][3] in ("rank 0: a", "rank 2: b")


def test_another_name_on_the_same_store_is_another_agreement() -> None:
    (store,) = tcp_stores(1)
    assert Agreement(store, 1, "first start")("full") == "full"
    assert Agreement(store, 1, "second start")(None) is None


def test_a_rank_that_does_not_arrive_is_an_error_in_time() -> None:
    (store,) = tcp_stores(1)
    with pytest.raises(DistStoreError):
        Agreement(store, 2, "test", timedelta(seconds=0.2))(None)


def test_what_several_ranks_say_is_taken_once() -> None:
    main, other = (Notices(store, "test") for store in tcp_stores(2))
    assert main.take() == []
    other.give("a: altered")
    main.give("b: cut off")
    other.give("b: cut off")
    assert main.take() == ["a: altered", "b: cut off"]
    main.give("a: altered")
    other.give("c: altered")
    assert main.take() == ["c: altered"]
    assert main.take() == []
