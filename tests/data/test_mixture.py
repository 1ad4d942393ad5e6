from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.mixture import Mixture, Share
from megatrain.errors import InputError

weights = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=9)


def mixture(shares: list[Share]) -> Mixture:
    return Mixture({f"source{i}": share for i, share in enumerate(shares)})


@settings(max_examples=100, deadline=None)
@given(weights=weights)
def test_shares_hold_at_every_prefix(weights: list[float]) -> None:
    source, place = mixture([Share(weight, 100) for weight in weights]).locate(np.arange(3000))
    given_so_far = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 3001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(given_so_far - wanted).max() < 1.7
    # Each source's places count on: 0, 1, 2, ...
    assert np.array_equal(place, given_so_far[np.arange(3000), source] - 1)


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(
        st.builds(
            Share, weight=st.floats(0.01, 10), samples=st.integers(1, 200), max_epochs=st.floats(0.1, 4) | st.none()
        ),
        min_size=1,
        max_size=6,
    ),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
)
def test_limits_are_kept_and_handed_on(shares: list[Share], cuts: list[int]) -> None:
    mixed = mixture(shares)
    limits = [share.limit for share in shares]
    endless = None in limits
    assert mixed.total_samples == (None if endless else sum(limit for limit in limits if limit is not None))
    total = mixed.total_samples or 3000
    source, place = mixed.locate(np.arange(total))
    given_so_far = np.cumsum(source[:, None] == np.arange(len(shares)), axis=0)
    assert np.array_equal(place, given_so_far[np.arange(total), source] - 1)
    for number, limit in enumerate(limits):
        if limit is not None:
            assert given_so_far[-1, number] <= limit
    # Between two ends of sources those left share in proportion.
    full = np.array([2**62 if limit is None else limit for limit in limits])
    active = np.vstack([np.ones(len(shares), bool), given_so_far[:-1] < full])
    part = active * np.array([share.weight for share in shares])
    wanted = np.cumsum(part / part.sum(axis=1, keepdims=True), axis=0)
    assert np.abs(given_so_far - wanted).max() < 1.7 * len(shares)
    # Where one starts doesn't matter.
    for cut in cuts:
        tail_source, tail_place = mixed.locate(np.arange(min(cut, total), total))
        assert np.array_equal(tail_source, source[cut:])
        assert np.array_equal(tail_place, place[cut:])


def test_a_used_up_source_leaves_at_the_expected_sample() -> None:
    mixed = mixture([Share(1, 10, 1), Share(1, 100, 1)])
    source, _ = mixed.locate(np.arange(110))
    assert np.flatnonzero(source == 0)[-1] in (18, 19)
    assert (source[20:] == 1).all()
    assert mixed.total_samples == 110


def test_far_along_it_is_as_exact_as_at_the_start() -> None:
    n = 3 * 10**17 + np.arange(4000)
    source, place = mixture([Share(0.75, 10), Share(0.125, 10), Share(0.125, 10)]).locate(n)
    share = np.array([0.75, 0.125, 0.125])[source]
    # In whole numbers: place = n * share within 2 samples.
    assert np.abs(place * 8 - n * (share * 8).astype(np.int64)).max() <= 16
    assert np.abs(np.bincount(source) - [3000, 500, 500]).max() <= 2


def test_one_source_is_the_trivial_case() -> None:
    source, place = mixture([Share(0.3, 7)]).locate(np.arange(50))
    assert not source.any()
    assert np.array_equal(place, np.arange(50))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_named(weight: float) -> None:
    with pytest.raises(
        InputError, match=r"^data\.sources\.web\.weight=.*(number of 0 or more|has to have a weight above 0)$"
    ):
        Mixture({"web": Share(weight, 10)})


def test_a_limit_of_nothing_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.sources\.web\.max_epochs=0.*must be a number above 0"):
        Mixture({"web": Share(1.0, 10, 0.0)})


def test_where_all_are_used_up_none_gives() -> None:
    mixture = Mixture({"a": Share(1.0, 10, 1.0, used=10), "b": Share(2.0, 10, 0.5, used=5)})
    assert mixture.total_samples == 0
    assert mixture.given(0) == [0, 0]
