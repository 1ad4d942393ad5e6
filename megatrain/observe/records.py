"""What a run writes down: a record a step, and the JSON lines that records and events are kept in.

Design choices:
- A number that isn't finite has no JSON form, so in a line it is null and its name is in `non_finite` ("nan", "inf",
  "-inf"): every JSON reader takes the file, a table reader sees a gap, and `read` gives the number back.
- A reader never fails on the line that a dying process left half-written; it leaves it out.
- A full disk ends no training: lines that it doesn't take are kept until it does.
- Floats are written as Python prints them, which is exact: two runs are compared bit for bit through their files.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Value = str | int | float | None
Record = dict[str, Value]

NON_FINITE = "non_finite"
SECRETS = frozenset({"key", "secret", "token", "password", "passwd", "passphrase", "credential", "credentials"})
"""Words that a configuration key naming a secret contains (api_key, hub_token; not tokenizer, not max_tokens)."""


def encode(record: Mapping[str, object]) -> str:
    """One line of JSON, without its newline. Numbers that aren't finite: see the design choices."""
    line = dict(record)
    non_finite = {
        name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)
    }
    if non_finite:
        line |= dict.fromkeys(non_finite, None)
        line[NON_FINITE] = non_finite
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


def decode(line: bytes) -> Record | None:
    """What `encode` made a line of; None for anything that isn't a whole JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    non_finite = record.pop(NON_FINITE, {})
    return record | {name: float(value) for name, value in non_finite.items()}


def read(path: Path) -> Iterator[Record]:
    """The whole records of a JSON lines file in order; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            record = decode(line)
            if record is not None:
                yield record


class LineFile:
    """Adds records to a JSON lines file, made where there is none. A half-written last line is ended first."""

    def __init__(self, path: Path) -> None:
        # Unbuffered, and one write a line: a killed process leaves whole lines and at most one piece.
        self._file = path.open("a+b", buffering=0)
        self._waiting = bytearray()
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._waiting += b"\n"

    def write(self, record: Mapping[str, object]) -> None:
        """Adds a line, or keeps it in memory while the disk is full."""
        self._waiting += encode(record).encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def sync(self) -> None:
        """Makes what the disk has taken durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Raises OSError where the disk is still too full."""
        self._write_waiting()
        self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:  # A disk that fills up takes the beginning of a line.
            del self._waiting[: self._file.write(self._waiting)]


def without_secrets(tree: Any) -> Any:
    """A copy of a configuration tree of dicts, lists and values without the keys that name a secret (law 8)."""
    if isinstance(tree, Mapping):
        return {
            key: without_secrets(value)
            for key, value in tree.items()
            if SECRETS.isdisjoint(str(key).lower().replace("-", "_").split("_"))
        }
    if isinstance(tree, list | tuple):
        return [without_secrets(value) for value in tree]
    return tree
