"""The pool: order, errors and deaths, with real processes."""

import os
import signal
import time

import pytest

from megatrain.data_prep.execute.pool import in_order
from megatrain.data_prep.execute.tasks import WorkerDiedError
from megatrain.errors import GaveUp


def square(number: int) -> tuple[int, int]:
    """Early tasks take longest. A negative number fails, a large one kills its process."""
    if number < 0:
        raise GaveUp(f"{number} is negative")
    if number > 100:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01 * (6 - number))
    return number**2, os.getpid()


def test_results_are_in_order_and_from_several_processes() -> None:
    found = list(in_order(square, range(6), 2))
    assert [result for result, _ in found] == [0, 1, 4, 9, 16, 25]
    processes = {process for _, process in found}
    assert len(processes) == 2
    assert os.getpid() not in processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_an_error_is_raised_here_and_a_death_names_its_task() -> None:
    with pytest.raises(GaveUp) as gave_up:
        list(in_order(square, [0, -1, 2], 2))
    assert str(gave_up.value) == "-1 is negative"
    with pytest.raises(WorkerDiedError) as died:
        list(in_order(square, [0, 1, 2, 101], 2))
    assert died.value.task == 3
