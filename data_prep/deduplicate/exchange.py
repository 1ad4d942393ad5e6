"""What lies between the units: the keys of all of them are compared, a range at a time, through files.

Design choices:
- A task compares one range of the keys of one kind, over all units, and writes the pairs that it finds. There are as
  many ranges as it takes for a task to fit its memory: keys are hashes, so ranges of equal width hold about as many.
- Everything lies in a folder named by a digest of all units' keys. Tasks leave whole files, and one that finds its file
  there has nothing to do. So a start after a crash does the rest, and what other input left is never taken for this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from megatrain.data_prep.deduplicate.keys import EXACT, alike, read_keys
from megatrain.data_prep.deduplicate.words import Int64, UInt64
from megatrain.data_prep.files import AtomicFile

Task = TypeVar("Task")
Result = TypeVar("Result")

KEY_BYTES = 64
"""Memory that a task takes for a key: the key, its document and its check, twice, and their order."""
PLAN = "plan.json"


class Run(Protocol):
    """Runs a function on tasks, anywhere that sees the files; gives the results in the order of the tasks.

    A task is pickled, and has a `name`. Raises for a task that fails.
    """

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]: ...


@dataclass(frozen=True)
class Plan:
    """What the tasks of an exchange share. units: the units' folders, in order. starts: the number of each unit's first
    document among all; the last is the number of all. kinds, ranges: how many, and ranges of each."""

    units: list[str]
    starts: list[int]
    kinds: int
    ranges: int


@dataclass(frozen=True)
class KeyRange:
    """A task: one range of the keys of one kind. folder: where the plan lies."""

    folder: str
    kind: int
    number: int

    @property
    def name(self) -> str:
        """For people."""
        return f"duplicates, kind {self.kind}, range {self.number}"

    @property
    def pairs(self) -> Path:
        """What it leaves: int64[pairs, 2], the numbers of a document and of the first one that is like it."""
        return Path(self.folder) / f"pairs_{self.kind:03d}_{self.number:06d}"


@dataclass(frozen=True)
class Join:
    """The task that comes after all ranges. folder: where the plan lies. name: for people."""

    folder: str
    name: str


def make_plan(units: Sequence[Path], folder: Path, memory_bytes: int) -> str:
    """Writes the plan into its own folder below `folder`, and gives that. Raises GaveUp for a file that isn't whole."""
    digest = xxhash.xxh3_128()
    starts, kinds = [0], 0
    for unit in units:
        keys = read_keys(unit)
        digest.update(keys.digest.to_bytes(8, "little"))
        starts.append(starts[-1] + keys.rows)
        kinds = max(kinds, len(keys.kinds))
    ranges = max(1, -(-starts[-1] * KEY_BYTES // memory_bytes))
    digest.update(ranges.to_bytes(8, "little"))
    return write_plan(folder / digest.hexdigest(), asdict(Plan([str(unit) for unit in units], starts, kinds, ranges)))


def write_plan(folder: Path, plan: dict[str, Any]) -> str:
    """Makes the folder and writes the plan into it; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with AtomicFile(folder / PLAN) as file:
        file.write(json.dumps(plan).encode())
    return str(folder)


@lru_cache(maxsize=2)
def read_plan(folder: str) -> Plan:
    """The plan that make_plan left there."""
    return Plan(**json.loads((Path(folder) / PLAN).read_bytes()))


def key_ranges(folder: str) -> list[KeyRange]:
    """The tasks of a plan, by kind."""
    plan = read_plan(folder)
    return [KeyRange(folder, kind, number) for kind in range(plan.kinds) for number in range(plan.ranges)]


def find_pairs(task: KeyRange) -> None:
    """Compares the keys of a range and leaves the pairs."""
    if task.pairs.exists():
        return
    plan = read_plan(task.folder)
    parts: list[tuple[UInt64, Int64, UInt64]] = []
    for unit, start in zip(plan.units, plan.starts, strict=False):
        kinds = read_keys(Path(unit)).kinds
        if task.kind >= len(kinds):  # a unit of which no document is left
            continue
        kind = kinds[task.kind]
        own = within(kind.key, task.number, plan.ranges)
        parts.append((np.array(kind.key[own]), kind.row[own] + np.int64(start), np.array(kind.check[own])))
    keys, documents, checks = (np.concatenate(column) for column in zip(*parts, strict=True))
    del parts
    _, pairs = alike(keys, checks)
    with AtomicFile(task.pairs) as file:
        file.write(documents[pairs].astype("<i8").tobytes())


def within(keys: UInt64, number: int, ranges: int) -> slice:
    """Where the keys of a range lie in `keys`, ascending. The ranges are all 64-bit numbers, cut evenly."""
    ends = [end * 2**64 // ranges for end in (number, number + 1)]
    first, last = (len(keys) if end == 2**64 else int(np.searchsorted(keys, np.uint64(end))) for end in ends)
    return slice(first, last)


def all_pairs(folder: str, at_once: int) -> Iterator[tuple[bool, Int64]]:
    """All pairs, `at_once` at most: whether it is their text that is alike, and int64[pairs, 2] as KeyRange.pairs has
    them. Those that lie in one unit come first, then those of the ranges."""
    plan = read_plan(folder)
    for unit, start in zip(plan.units, plan.starts, strict=False):
        keys = read_keys(Path(unit))
        for is_exact, repeats in ((True, keys.exact_repeats), (False, keys.fuzzy_repeats)):
            for first in range(0, len(repeats), at_once):
                yield is_exact, repeats[first : first + at_once] + np.int64(start)
    for task in key_ranges(folder):
        count = task.pairs.stat().st_size // 16
        for first in range(0, count, at_once):
            pairs = np.fromfile(task.pairs, "<i8", 2 * min(at_once, count - first), offset=16 * first)
            yield task.kind == EXACT, pairs.reshape(-1, 2)
