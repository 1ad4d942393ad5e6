from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data import order
from megatrain.data.order import MAX_SIZE, Int64, permute, shuffled, source_key


def test_every_size_to_5000_is_a_bijection() -> None:
    for size in range(1, 5001):
        image = permute(np.arange(size), size, np.full(size, size, np.uint64))
        assert np.array_equal(np.sort(image), np.arange(size)), size


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, MAX_SIZE), first=st.integers(0, MAX_SIZE), key=st.integers(0, 2**64 - 1))
def test_large_sizes_stay_inside_and_never_repeat(size: int, first: int, key: int) -> None:
    index = (first % size + np.arange(min(size, 1000))) % size
    image = permute(index, size, np.full(len(index), key, np.uint64))
    assert len(np.unique(image)) == len(index)
    assert image.min() >= 0
    assert image.max() < size


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 500), seed=st.integers(0, 9), epoch=st.integers(0, 10**9))
def test_a_stream_holds_every_sample_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    key = source_key(seed, "web", 0)
    samples = shuffled(np.arange(epoch * size, (epoch + 1) * size), size, key)
    assert np.array_equal(np.sort(samples), np.arange(size))
    # One call over several epochs is the same as one call an epoch.
    assert np.array_equal(shuffled(np.arange(epoch * size, (epoch + 2) * size), size, key)[:size], samples)


def test_epochs_seeds_sources_and_permutations_differ() -> None:
    size = 1000
    keys = [source_key(0, "a", 0), source_key(1, "a", 0), source_key(0, "b", 0), source_key(0, "a", 1)]
    epochs = [shuffled(np.arange(e * size, (e + 1) * size), size, key) for key in keys for e in range(3)]
    for i, one in enumerate(epochs):
        for other in epochs[:i]:
            assert (one == other).sum() < 15  # of two random permutations one place agrees, on average


def test_the_order_is_what_it_always_was() -> None:
    """A checkpoint names a place in this order: another order would repeat and leave out samples."""
    assert source_key(0, "data", 0) == 15800179140787081630
    assert shuffled(np.arange(8), 1000, source_key(0, "data", 0)).tolist() == [125, 679, 875, 23, 763, 903, 6, 169]
    far = np.arange(10**15, 10**15 + 3)
    assert shuffled(far, 10**12 + 39, source_key(7, "web", 1)).tolist() == [462277642532, 442540886165, 302754982008]


def pair_statistic(size: int) -> float:
    """How many standard deviations the chi-square of (image of 0, image of the last) is above its mean, over epochs."""
    epochs = 40_000
    stream = np.arange(epochs) * size
    first, last = (shuffled(stream + place, size, 1234) for place in (0, size - 1))
    counts: Int64 = np.bincount(first * size + last, minlength=size * size).reshape(size, size)
    assert counts.diagonal().sum() == 0
    expected = epochs / (size * (size - 1))
    chi_square = ((counts - expected)[~np.eye(size, dtype=bool)] ** 2 / expected).sum()
    degrees = size * (size - 1) - 1
    return float((chi_square - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("size", [2, 3, 5, 10, 37])
def test_places_are_uniform_and_independent(size: int) -> None:
    assert abs(pair_statistic(size)) < 4


def test_the_statistic_sees_too_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_ROUND_KEYS", order._ROUND_KEYS[:6])
    assert pair_statistic(5) > 20


def test_the_median_jump_is_that_of_a_random_permutation() -> None:
    size = 200_000
    jumps = np.abs(np.diff(shuffled(np.arange(size), size, 5))) / size
    assert np.median(jumps) == pytest.approx(1 - math.sqrt(0.5), abs=0.005)
