"""A local Ray cluster does what the pool does, and a worker's death is one failed attempt."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.data_prep.execute import ExecuteConfig, Executor, Failure, each
from megatrain.errors import GaveUp
from tests.data_prep.execute.work import Task, attempts, do, done, squares

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.distributed
CONFIG = ExecuteConfig(executor=Executor.ray, workers=2, retries=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    yield
    ray.shutdown()


def test_results_are_those_of_the_pool_and_what_fails_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path)
    special = {
        1: Task(1, folder, "raise"),
        2: Task(2, folder, "raise", failing=1),
        3: Task(3, folder, "die"),
        4: Task(4, folder, "die", failing=1),
    }
    tasks = [special.get(number, Task(number, folder)) for number in range(12)]
    found = dict(each(do, tasks, CONFIG, tmp_path))
    failures = {number: found.pop(number) for number in (1, 3)}
    assert found == done(tmp_path) == {number: value for number, value in squares(12).items() if number not in failures}
    assert {number: failure.reason for number, failure in failures.items() if isinstance(failure, Failure)} == {
        1: "ValueError: 1 is bad",
        3: "its Ray worker was lost (WorkerCrashedError)",
    }
    assert [len(attempts(tmp_path, number)) for number in range(5)] == [1, 2, 2, 2, 2]


def test_giving_up_ends_all_at_once(tmp_path: Path) -> None:
    tasks = [Task(0, str(tmp_path), "give up"), *(Task(number, str(tmp_path), seconds=5) for number in range(1, 9))]
    with pytest.raises(GaveUp, match="the disk is full"):
        list(each(do, tasks, CONFIG, tmp_path))
    assert done(tmp_path) == {}
