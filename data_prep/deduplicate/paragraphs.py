"""Which lines an earlier document has already: their keys, and the exchange of them between units, through files.

Design choices:
- A line is compared by a 64-bit hash of its words with single spaces between, in Unicode's form NFC. Of 1e9 different
  lines, two are taken for the same with a chance of 3%.
- The first document that has a line keeps it, as often as it has it: what repeats inside one document is for the
  filters to judge. Documents that go as duplicates don't count.
- The exchange is that of documents (exchange.py), without clusters: what a unit needs to know of a key is the row that
  keeps the line, or that an earlier unit has it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data_prep.deduplicate.by_unit import ByUnit, write_by_unit
from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.duplicates import Duplicates
from megatrain.data_prep.deduplicate.exchange import KEY_BYTES, PLAN, Join, Run, within, write_plan
from megatrain.data_prep.deduplicate.keys import alike, source_hashes
from megatrain.data_prep.deduplicate.words import Bools, Int64, UInt64, mix
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.files import AtomicFolder
from megatrain.errors import GaveUp

Lines = npt.NDArray[np.void]

LINE = np.dtype([("key", "<u8"), ("row", "<u4")])
"""A line of a unit: its key, and the row of a document that has it."""
EARLIER = 2**32 - 1
"""In place of a row: an earlier unit has the line."""
LINES, REPEATED = "lines.keys", "repeated_lines"


@dataclass(frozen=True)
class LineKeys:
    """The keys of the lines of a batch of documents that are compared, in order.

    place: int64[lines], which line of its document it is. counts: int64[documents], how many each has.
    """

    key: UInt64
    place: Int64
    counts: Int64


def line_keys(documents: Documents, config: DeduplicateConfig) -> LineKeys:
    """What the lines of these are compared by."""
    least = config.paragraphs.min_characters
    keys: list[int] = []
    places: list[int] = []
    counts: list[int] = []
    for text in documents.texts:
        before = len(keys)
        for place, line in enumerate(text.split("\n")):
            if len(line) >= least:
                same = " ".join(unicodedata.normalize("NFC", line).split())
                if len(same) >= least:
                    keys.append(xxhash.xxh3_64_intdigest(same.encode()))
                    places.append(place)
        counts.append(len(keys) - before)
    key, count = np.array(keys, np.uint64), np.array(counts, np.int64)
    if not config.across_sources:
        key = mix(key ^ np.repeat(source_hashes(documents), count))
    return LineKeys(key, np.array(places, np.int64), count)


def write_line_keys(result: AtomicFolder, batches: Sequence[LineKeys]) -> None:
    """Writes the keys of a unit's lines, all batches in order, as a file of its results.

    Its format: all keys, uint64, ascending; the row of each, uint32; their digest, uint64. A key that a row has twice
    is there once.
    """
    counts = np.concatenate([np.zeros(0, np.int64), *(batch.counts for batch in batches)])
    keys = np.concatenate([np.zeros(0, np.uint64), *(batch.key for batch in batches)])
    rows = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    order = np.argsort(keys, kind="stable")  # rows ascend already
    keys, rows = keys[order], rows[order]
    is_new = _changes(keys) | _changes(rows)
    data = keys[is_new].tobytes() + rows[is_new].tobytes()
    file = result.file(LINES)
    file.write(data)
    file.write(xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"))


@dataclass(frozen=True)
class Plan:
    """What the tasks share. units: the units' folders. duplicates: the folder of those, if any. ranges: how many."""

    units: list[str]
    duplicates: str | None
    ranges: int


@dataclass(frozen=True)
class LineRange:
    """A task: one range of the keys. folder: where the plan lies."""

    folder: str
    number: int

    @property
    def name(self) -> str:
        """For people."""
        return f"repeated lines, range {self.number}"

    @property
    def repeated(self) -> Path:
        """What it leaves: LINEs by unit, as find_paragraphs says."""
        return Path(self.folder) / f"lines_{self.number:06d}"


def find_paragraphs(
    units: Sequence[Path], folder: Path, config: DeduplicateConfig, run: Run, duplicates: Duplicates | None
) -> Path:
    """Compares the lines of all units, of which each folder holds its file of line keys, in the order of the input.

    duplicates: the documents that don't count. folder: for the exchange; what was done there before, of the same keys,
    isn't done again. Gives the file of LINEs by unit: the lines that a document of the unit doesn't keep, with the row
    that does. Raises GaveUp.
    """
    digest = xxhash.xxh3_128(duplicates.folder.name.encode() if duplicates else b"")
    total = 0
    for unit in units:
        keys, _, unit_digest = _read(unit)
        digest.update(unit_digest)
        total += len(keys)
    ranges = max(1, -(-total * KEY_BYTES // config.memory_bytes))
    digest.update(ranges.to_bytes(8, "little"))
    plan = Plan([str(unit) for unit in units], str(duplicates.folder) if duplicates else None, ranges)
    planned = write_plan(folder / digest.hexdigest(), asdict(plan))
    run(find_lines, [LineRange(planned, number) for number in range(ranges)])
    run(join_lines, [Join(planned, "repeated lines by unit")])
    return Path(planned) / REPEATED


def find_lines(task: LineRange) -> None:
    """Compares the keys of a range, and leaves those that are there more than once."""
    if task.repeated.exists():
        return
    plan = _read_plan(task.folder)
    firsts, are_again = zip(*_lines_of_units(plan, task.number), strict=True) if plan.units else ((), ())
    unit = np.repeat(np.arange(len(firsts)), [len(first) for first in firsts])
    lines, chosen = np.concatenate([np.zeros(0, LINE), *firsts]), np.concatenate([np.zeros(0, np.bool_), *are_again])
    _, pairs = alike(lines["key"], np.zeros(0, np.uint64))
    lines["row"][pairs[:, 0]] = EARLIER
    chosen[pairs[:, 0]] = True
    ends = np.searchsorted(unit[chosen], np.arange(len(plan.units)), side="right")
    write_by_unit(task.repeated, np.split(lines[chosen], ends)[: len(plan.units)])


def join_lines(task: Join) -> None:
    """Puts what all ranges found together, by unit."""
    path = Path(task.folder) / REPEATED
    if path.exists():
        return
    plan = _read_plan(task.folder)
    parts = [ByUnit(LineRange(task.folder, number).repeated, LINE) for number in range(plan.ranges)]
    write_by_unit(path, (np.concatenate([part[unit] for part in parts]) for unit in range(len(plan.units))))


def _lines_of_units(plan: Plan, number: int) -> Iterator[tuple[Lines, Bools]]:
    """The lines of a range in each unit, without those of documents that go; and which of them are in other rows too.

    Each is there once, with its first row: one that is on every page takes no more memory than others.
    """
    duplicates = Duplicates(Path(plan.duplicates)) if plan.duplicates else None
    for unit, folder in enumerate(plan.units):
        keys, rows, _ = _read(Path(folder))
        own = within(keys, number, plan.ranges)
        lines = np.zeros(len(keys[own]), LINE)
        lines["key"], lines["row"] = keys[own], rows[own]
        if duplicates:
            lines = lines[~np.isin(lines["row"], duplicates.removed(unit)["row"])]
        starts = np.flatnonzero(_changes(lines["key"]))
        yield lines[starts], np.diff(starts, append=len(lines)) > 1


def _changes(values: npt.NDArray[np.generic]) -> Bools:
    """Where a value differs from the one before it; true for the first."""
    changes = np.ones(len(values), np.bool_)
    changes[1:] = values[1:] != values[:-1]
    return changes


def _read(folder: Path) -> tuple[UInt64, npt.NDArray[np.uint32], bytes]:
    """The keys and rows of a unit, mapped, and their digest. Raises GaveUp where the file isn't whole."""
    path = folder / LINES
    try:
        data = np.memmap(path, np.uint8, "r")
        count, rest = divmod(len(data) - 8, LINE.itemsize)
        if rest or count < 0:
            raise ValueError("it isn't a whole file of line keys")
        return data[: 8 * count].view("<u8"), data[8 * count : -8].view("<u4"), data[-8:].tobytes()
    except (OSError, ValueError) as error:
        raise GaveUp(f"{path}: can't be read: {error}") from None


@lru_cache(maxsize=2)
def _read_plan(folder: str) -> Plan:
    return Plan(**json.loads((Path(folder) / PLAN).read_bytes()))
