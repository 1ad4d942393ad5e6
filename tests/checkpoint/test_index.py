"""The index: what the ranks' rows become, and what a reader doesn't believe."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.checkpoint.format import BrokenCheckpoint
from megatrain.checkpoint.index import Row, encode_index, encode_rows, merge, parse_index, parse_rows

HASHES = ["1" * 32, "2" * 32, "3" * 32]
CUTS = st.lists(st.integers(1, 99), unique=True).map(lambda inner: [0, *sorted(inner), 100])


def rows_of(cuts: list[int], state: str = "master") -> list[Row]:
    """A parameter of 100 elements, cut there and dealt to three ranks."""
    ranges = itertools.pairwise(cuts)
    return [Row(n % 3, state, "w", (4, 25), "float32", *one, 1_000_000 * n) for n, one in enumerate(ranges)]


@given(cuts=CUTS, start=st.integers(0, 100), stop=st.integers(0, 100), seed=st.integers(0, 9))
def test_it_says_who_holds_what(cuts: list[int], start: int, stop: int, seed: int) -> None:
    rows = rows_of(cuts)
    written = [encode_rows([row for row in rows if row.rank == rank], HASHES[rank]) for rank in range(3)]
    parsed = [parse_rows(raw, rank) for rank, raw in enumerate(written)]
    assert [digest for _, digest in parsed] == HASHES
    shuffled = [row for own, _ in parsed for row in own]
    random.Random(seed).shuffle(shuffled)
    index, hashes = parse_index(encode_index(merge(shuffled), HASHES), world_size=3)
    assert hashes == HASHES
    assert list(index) == [("master", "w")]
    ranges = index["master", "w"]
    assert (ranges.shape, ranges.dtype, ranges.size) == ((4, 25), "float32", 100)
    start, stop = min(start, stop), max(start, stop)
    expected = [(row.rank, row.start, row.stop, row.offset) for row in rows if row.start < stop and start < row.stop]
    assert list(ranges.overlapping(start, stop)) == (expected if start < stop else [])


def test_states_of_a_parameter_have_one_shape() -> None:
    other = Row(0, "momentum", "w", (100,), "float32", 0, 100, 400)
    with pytest.raises(BrokenCheckpoint, match="w: its states disagree about its shape"):
        encode_index(merge([*rows_of([0, 100]), other]), HASHES)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("rank", [0, 3]),
        ("rank", [-1, 1]),
        ("stop", [60, 99]),
        ("stop", [60, 101]),
        ("stop", [100, 100]),
        ("stop", [-1, 100]),
        ("stop", [100]),
        ("stop", [2**70, 100]),
        ("offset", [-4, 0]),
        ("offset", [0]),
        ("dtype", "object"),
    ],
)
def test_numbers_that_lead_outside_are_refused(column: str, value: Any) -> None:
    """An index that somebody wrote on purpose has the right hash."""
    index = json.loads(encode_index(merge(rows_of([0, 60, 100])), HASHES))
    index["parameters"][0]["states"]["master"][column] = value
    with pytest.raises(
        BrokenCheckpoint, match=r"^index\.json: (what it says of master of w can't be|not of this format)"
    ):
        parse_index(json.dumps(index).encode(), world_size=3)
