"""A file of records that belong to units: those of one are found at once, whatever else it holds.

Design choices:
- The records of all units in order, then where those of each begin, then the number of units: it is written in one
  pass, and mapped by who reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.files import AtomicFile
from megatrain.errors import GaveUp


def write_by_unit(path: Path, records: Iterable[npt.NDArray[Any]]) -> None:
    """records: an array for each unit, all of one dtype (little-endian)."""
    starts = [0]
    with AtomicFile(path) as file:
        for array in records:
            file.write(array.tobytes())
            starts.append(starts[-1] + len(array))
        file.write(np.array([*starts, len(starts) - 1], "<i8").tobytes())


class ByUnit:
    """Reads what write_by_unit wrote. Raises GaveUp where the file isn't whole."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        try:
            self._data = np.memmap(path, np.uint8, "r")
            units = int(self._data[-8:].view("<i8")[0])
            end = len(self._data) - 8 * (units + 2)
            self._starts = self._data[max(end, 0) : -8].view("<i8")
            if units < 0 or end != self._starts[-1] * self._dtype.itemsize:
                raise ValueError("it isn't whole")
        except (OSError, ValueError, IndexError) as error:
            raise GaveUp(f"{path}: can't be read: {error}") from None

    def __len__(self) -> int:
        """Units."""
        return len(self._starts) - 1

    def __getitem__(self, unit: int) -> npt.NDArray[Any]:
        """The records of a unit, mapped."""
        start, end = (int(place) * self._dtype.itemsize for place in self._starts[unit : unit + 2])
        return self._data[start:end].view(self._dtype)
