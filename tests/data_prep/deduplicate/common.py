"""What the tests of deduplication share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pyarrow as pa

from megatrain.data_prep.documents import SCHEMA, Documents

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [function(task) for task in tasks]


def run_shuffled(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    results = {number: function(tasks[number]) for number in random.Random(0).sample(range(len(tasks)), len(tasks))}
    return [results[number] for number in range(len(tasks))]


@contextmanager
def fast_folder() -> Iterator[Path]:
    """Of its own, in memory where the machine has such a place: many small files are synced."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def documents(texts: Sequence[str], sources: Sequence[str | None] | None = None) -> Documents:
    """A batch of these texts, with their numbers as ids."""
    columns = {
        "id": [str(number) for number in range(len(texts))],
        "text": list(texts),
        "source": list(sources or [None] * len(texts)),
    }
    arrays = [pa.array(columns.get(field.name, [None] * len(texts)), field.type) for field in SCHEMA]
    return Documents(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
