"""The bytes of a set depend neither on who made it nor on the order in which its parts were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatrain.data_prep import pipeline
from megatrain.data_prep.execute import Executor
from tests.data_prep.sets import prepare, write_input


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_input(folder)
    return folder


@pytest.fixture(scope="module")
def made_by_one(folder: Path) -> dict[str, bytes]:
    return prepare(folder, folder / "one", workers=1)


def test_what_is_compared(folder: Path, made_by_one: dict[str, bytes]) -> None:
    """The input has something of all kinds, so that equal bytes say something."""
    found = json.loads((folder / "one" / "report.json").read_bytes())
    assert found["duplicates"]["exact"] >= 10
    assert found["duplicates"]["fuzzy"] >= 5
    assert found["steps"]["changed"]["paragraphs"]["repeated_lines"]["documents"] >= 5
    assert found["steps"]["dropped"]["length"]["min_characters"]["documents"] == 3
    assert sum(name.endswith(".tar") for name in made_by_one) > 5


def test_two_workers(folder: Path, made_by_one: dict[str, bytes], tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "two", workers=2) == made_by_one


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_units(
    folder: Path, made_by_one: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def each(function: Callable[[Any], Any], tasks: Sequence[Any], *_: object) -> Iterator[tuple[int, Any]]:
        """In this process, in another order, and each task twice."""
        numbers = [*range(len(tasks))] * 2
        Random(seed).shuffle(numbers)
        results = {number: function(tasks[number]) for number in numbers}
        yield from results.items()

    monkeypatch.setattr(pipeline, "each", each)
    assert prepare(folder, tmp_path / "shuffled") == made_by_one


@pytest.mark.distributed
def test_a_ray_cluster(folder: Path, made_by_one: dict[str, bytes], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    try:
        assert prepare(folder, tmp_path / "ray", executor=Executor.ray, workers=2) == made_by_one
    finally:
        ray.shutdown()
