from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data import order
from megatrain.data.order import EVERYWHERE, MAX_SIZE, Int64, Shuffle, permute, shuffled, source_key


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


SIZE = 1_000_000
IDEAL_JUMP = 1 - math.sqrt(0.5)
"""The median distance of two random places, as a part of the whole."""


@pytest.mark.parametrize(
    ("shuffle", "least_jump", "near"),
    [(EVERYWHERE, 0.292, 0.002), (Shuffle(1024, 64), 0.285, 0.018), (Shuffle(1024, 256), 0.291, 0.006)],
)
def test_the_next_sample_is_anywhere(shuffle: Shuffle, least_jump: float, near: float) -> None:
    """The median jump, and the share of jumps within a thousandth of the set, over three epochs."""
    jumps = np.abs(np.diff(shuffled(np.arange(3 * SIZE), SIZE, 5, shuffle))) / SIZE
    assert least_jump < np.median(jumps) < IDEAL_JUMP + 0.005
    assert (jumps < 0.001).mean() < near + 0.001


def deviations(counts: Int64) -> float:
    """How many standard deviations the chi-square of equally likely counts is above its mean."""
    expected = counts.mean()
    degrees = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("shuffle", [EVERYWHERE, Shuffle(10, 4), Shuffle(7, 4), Shuffle(100, 1), Shuffle(1, 3)])
@pytest.mark.parametrize("place", [0, 1, 50, 99])
def test_any_sample_may_stand_at_any_place(shuffle: Shuffle, place: int) -> None:
    """Over epochs; 7 doesn't divide 100, so some blocks and windows are short."""
    found = shuffled(np.arange(50_000) * 100 + place, 100, 77, shuffle)
    assert abs(deviations(np.bincount(found, minlength=100))) < 4


def test_stretches_of_an_epoch_are_from_all_over_the_set() -> None:
    """Hundredths of the epoch by hundredths of the set: as many samples in each cell, up to chance."""
    stream = shuffled(np.arange(SIZE), SIZE, 9)
    cells: Int64 = np.bincount((np.arange(SIZE) * 100 // SIZE) * 100 + stream * 100 // SIZE, minlength=10_000)
    assert cells.sum() == SIZE
    assert abs(deviations(cells) * math.sqrt(9999 / 9801)) < 4  # rows and columns are full: 99 * 99 degrees


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 700),
    block=st.integers(1, 800),
    blocks=st.integers(1, 9),
    epoch=st.integers(0, 10**9),
)
def test_blocks_are_read_whole_window_by_window(size: int, block: int, blocks: int, epoch: int) -> None:
    place = np.arange(epoch * size, (epoch + 1) * size)
    samples = shuffled(place, size, 3, Shuffle(block, blocks))
    assert np.array_equal(np.sort(samples), np.arange(size))
    for at in range(0, size // block * block, block * blocks):
        window = np.sort(samples[at : at + block * blocks])
        gaps = np.flatnonzero(np.diff(window, append=window[0] + size) != 1)
        assert len(gaps) <= blocks + 2  # runs of consecutive samples; the ring's end and the epoch's cut one each
    assert np.array_equal(shuffled(place[::7], size, 3, Shuffle(block, blocks)), samples[::7])


def test_blocks_of_a_large_set_are_what_they_always_were() -> None:
    place = np.arange(10**17, 10**17 + 4096)
    samples = shuffled(place, 10**12 + 39, source_key(7, "web", 1), Shuffle(1024, 64))
    assert len(np.unique(samples)) == 4096
    assert samples[:3].tolist() == [81724769809, 796630906334, 655661475549]
