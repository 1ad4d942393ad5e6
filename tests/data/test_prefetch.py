from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from megatrain.data.prefetch import Prefetch
from megatrain.errors import GaveUp


def wait_until_idle(made: list[int]) -> int:
    """How many items were made once no more are."""
    count = -1
    while len(made) != count:
        count = len(made)
        time.sleep(0.05)
    return count


def counting(made: list[int]) -> Iterator[int]:
    for number in range(1000):
        made.append(number)
        yield number


def test_items_come_in_order_and_end() -> None:
    items = Prefetch(iter(range(20)), 3)
    assert list(items) == list(range(20))
    with pytest.raises(StopIteration):
        next(items)
    items.close()


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_than_depth_are_made_ahead(depth: int) -> None:
    made: list[int] = []
    items = Prefetch(counting(made), depth)
    assert wait_until_idle(made) == depth
    assert next(items) == 0
    assert wait_until_idle(made) == depth + 1
    items.close()


def test_an_error_arrives_in_its_place_as_itself() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise GaveUp("the member is broken")

    items = Prefetch(failing(), 2)
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(GaveUp, match="the member is broken"):
            next(items)
    items.close()


def test_close_ends_the_thread() -> None:
    made: list[int] = []
    before = threading.active_count()
    items = Prefetch(counting(made), 2)
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert len(made) <= 4
