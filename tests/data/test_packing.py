from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.packing import best_fit, cut, pack_unit

Piece = tuple[int, int]
"""Where it begins, and its ids."""


def packed(lengths: list[int], sequence_length: int) -> list[list[Piece]]:
    """The pieces of each sample, out of the block."""
    block, samples, pieces = pack_unit(np.array(lengths, np.int64), sequence_length)
    ends, start, size = np.split(block.astype(int), [samples, samples + pieces])
    assert ends.dtype == int
    both = list(zip(start.tolist(), size.tolist(), strict=True))
    return [both[a:b] for a, b in pairwise([0, *ends.tolist()])]


def packed_by_hand(lengths: list[int], sequence_length: int) -> list[list[Piece]]:
    """Best-fit decreasing, from its definition: every sample is looked at for every piece."""
    pieces, begin = [], 0
    for length in lengths:
        pieces += [
            (begin + a, min(sequence_length + 1, length - a)) for a in range(0, max(length - 1, 0), sequence_length)
        ]
        begin += length
    samples: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (-piece[1], piece[0])):
        rooms = [sequence_length + 1 - sum(size for _, size in sample) for sample in samples]
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= piece[1]]
        if fitting:
            samples[min(fitting)[1]].append(piece)
        else:
            samples.append([piece])
    return [sorted(sample) for sample in samples]


units = st.lists(st.integers(1, 25) | st.integers(1, 90), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(lengths=units, sequence_length=st.integers(1, 30))
def test_samples_are_those_of_the_definition(lengths: list[int], sequence_length: int) -> None:
    assert packed(lengths, sequence_length) == packed_by_hand(lengths, sequence_length)


@settings(max_examples=300, deadline=None)
@given(lengths=units, sequence_length=st.integers(1, 30))
def test_every_token_but_the_first_of_a_document_is_predicted_once(lengths: list[int], sequence_length: int) -> None:
    samples = packed(lengths, sequence_length)
    assert max((sum(size for _, size in sample) for sample in samples), default=0) <= sequence_length + 1
    predicted = sorted(
        token for sample in samples for start, size in sample for token in range(start + 1, start + size)
    )
    first = set(np.cumsum([0, *lengths]).tolist())
    assert predicted == [token for token in range(sum(lengths)) if token not in first]


@settings(max_examples=100, deadline=None)
@given(lengths=units, sequence_length=st.integers(1, 30))
def test_what_fits_is_not_cut_and_no_two_samples_fit_into_one(lengths: list[int], sequence_length: int) -> None:
    samples = packed(lengths, sequence_length)
    whole = [(begin, length) for begin, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False)]
    held = {piece for sample in samples for piece in sample}
    assert {(begin, length) for begin, length in whole if 2 <= length <= sequence_length + 1} <= held
    filled = sorted(sum(size for _, size in sample) for sample in samples)
    assert len(filled) < 2 or filled[0] + filled[1] > sequence_length + 1


def test_the_pieces_of_a_long_document_overlap_in_one_id() -> None:
    start, size = cut(np.array([3, 11, 1, 5, 9]), 4)
    assert start.tolist() == [0, 3, 7, 11, 15, 20, 24]
    assert size.tolist() == [3, 5, 5, 3, 5, 5, 5]


def test_a_piece_goes_where_the_least_room_is_left() -> None:
    # 7 and 6 begin samples; 3 fills the first, 4 the second; of two samples with equal room the first is taken.
    assert best_fit(np.array([3, 7, 6, 4]), 10).tolist() == [0, 0, 1, 1]
    assert best_fit(np.array([6, 6, 4]), 10).tolist() == [0, 1, 0]
    assert best_fit(np.array([2, 10, 9, 10]), 10).tolist() == [3, 0, 2, 1]
