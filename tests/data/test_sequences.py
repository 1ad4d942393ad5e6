from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.sequences import UNIT_SAMPLES, ConcatIndex, Members, concat_columns, read_members
from megatrain.data.tables import in_memory
from tests.data.sets import write_set


def members(shards: list[list[int]]) -> Members:
    """Members of shards by their counts of tokens."""
    tokens = [count for shard in shards for count in shard]
    zeros = np.zeros(len(tokens), np.int64)
    return Members(
        first_token=np.cumsum([0, *tokens]),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in shards]),
        documents=zeros,
        tokens_offset=zeros,
        lengths_offset=zeros,
        digest=np.zeros((len(tokens), 16), np.uint8),
        most_documents=0,
    )


def concat(shards: list[list[int]], length: int) -> ConcatIndex:
    return ConcatIndex(in_memory(concat_columns(members(shards), length)), length)


def windows_by_hand(shards: list[list[int]], length: int) -> list[tuple[int, int]]:
    """The definition, member by member and window by window."""
    windows, at = [], 0
    for shard in shards:
        unit = 0
        for number, tokens in enumerate(shard):
            unit += tokens
            if -(-(unit - 1) // length) >= UNIT_SAMPLES or number == len(shard) - 1:
                windows += [(at + a, min(at + a + length + 1, at + unit)) for a in range(0, unit - 1, length)]
                at, unit = at + unit, 0
    return windows


@settings(max_examples=200, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 900), max_size=8), min_size=1, max_size=5),
    length=st.integers(1, 7),
)
def test_windows_are_those_of_the_definition(shards: list[list[int]], length: int) -> None:
    index = concat(shards, length)
    expected = windows_by_hand(shards, length)
    assert index.samples == len(expected)
    pieces = index.locate(np.arange(index.samples))
    assert pieces.sample.tolist() == list(range(index.samples))
    assert list(zip(pieces.start.tolist(), pieces.stop.tolist(), strict=True)) == expected
    if expected:
        targets = sum(stop - start - 1 for start, stop in expected)
        assert index.padding_share == pytest.approx(1 - targets / (length * len(expected)), abs=1e-12)


def test_a_unit_is_whole_members_with_256_samples() -> None:
    # 4 tokens a sample: a member of 1021 has 255, one of 1022 has 256.
    index = concat([[1021, 5, 1022, 7]], 4)
    pieces = index.locate(np.arange(index.samples))
    ends = pieces.stop[pieces.stop - pieces.start < 5].tolist()
    assert ends == [1026, 2048, 2055]  # 1021 + 5, then 1022 alone, then the rest of the shard


def test_less_than_two_tokens_are_no_sample() -> None:
    assert concat([[1], [], [1]], 4).samples == 0
    assert concat([], 4).samples == 0
    assert concat([[2]], 4).samples == 1


def test_members_are_those_of_the_indexes(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[3, 4], [5]], [[2, 2, 2]]])
    read = read_members(shards)
    stored = [member for number in range(2) for member in shards.members(number)]
    assert read.first_token.tolist() == [0, 7, 12, 18]
    assert read.shard.tolist() == [0, 0, 1]
    assert read.documents.tolist() == [2, 1, 3]
    assert read.tokens_offset.tolist() == [member.tokens_offset for member in stored]
    assert read.lengths_offset.tolist() == [member.lengths_offset for member in stored]
    assert [bytes(digest).hex() for digest in read.digest] == [member.xxh3_128 for member in stored]
