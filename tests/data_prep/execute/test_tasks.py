"""Attempts, and errors on their way between processes."""

import pytest

from megatrain.data_prep.execute.tasks import Attempts, Failure, attempt, outcome
from megatrain.errors import GaveUp


class TwoArgumentsError(Exception):
    """Is pickled, but can't be read again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail(error: Exception) -> None:
    raise error


def fail_unreadably(_: object) -> None:
    raise TwoArgumentsError("one", "two")


def make_lambda(_: object) -> object:
    return lambda: None


def test_a_task_waits_behind_the_others_until_it_has_failed_too_often() -> None:
    attempts = Attempts(range(3), retries=1)
    attempts.waiting.popleft()
    assert attempts.failed(0, ValueError("a\nb")) is None
    assert list(attempts.waiting) == [1, 2, 0]
    assert attempts.failed(1, ValueError()) is None
    assert attempts.failed(0, KeyError("a")) == Failure("KeyError: 'a'", attempts=2)
    with pytest.raises(GaveUp):
        attempts.failed(2, GaveUp("the disk is full"))


def test_a_result_and_an_error_come_back() -> None:
    assert outcome(attempt(abs, -1)) == (1, None)
    result, error = outcome(attempt(fail, GaveUp("no")))
    assert (result, str(error)) == (None, "no")
    assert isinstance(error, GaveUp)
    assert "in fail\n" in error.__notes__[0]


def test_what_doesnt_pickle_is_an_error_that_says_so() -> None:
    _, error = outcome(attempt(make_lambda, None))
    assert "pickle" in str(error)
    _, error = outcome(attempt(fail_unreadably, None))
    assert isinstance(error, RuntimeError)
    assert str(error) == "TwoArgumentsError: one and two"
    assert "in fail_unreadably\n" in error.__notes__[0]
