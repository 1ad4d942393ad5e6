"""Finding the duplicates among the documents of all units, and what was found.

Nothing of a document is needed but its keys; what goes, goes by its row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.data_prep.deduplicate.by_unit import ByUnit
from megatrain.data_prep.deduplicate.clusters import RECORD, REMOVED, SUMMARY, Summary, find_clusters
from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.exchange import Join, Run, find_pairs, key_ranges, make_plan
from megatrain.errors import GaveUp


class Duplicates:
    """Which documents go. Opened by whoever needs it, by the folder that find_duplicates gave."""

    def __init__(self, folder: Path) -> None:
        """Raises GaveUp where the files aren't whole."""
        self.folder = folder
        try:
            self.summary = Summary.from_json(json.loads((folder / SUMMARY).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GaveUp(f"{folder / SUMMARY}: can't be read: {error}") from None
        self._removed = ByUnit(folder / REMOVED, RECORD)

    def removed(self, unit: int) -> npt.NDArray[np.void]:
        """RECORD[documents] of a unit, by row."""
        return self._removed[unit]

    def kept(self, unit: int, rows: int) -> npt.NDArray[np.bool_]:
        """bool[rows]: which of a unit's documents stay."""
        kept = np.ones(rows, np.bool_)
        kept[self.removed(unit)["row"]] = False
        return kept


def find_duplicates(units: Sequence[Path], folder: Path, config: DeduplicateConfig, run: Run) -> Duplicates:
    """Compares the documents of all units, of which each folder holds its file of keys, in the order of the input.

    folder: for the exchange. What was done there before, of the same keys, isn't done again. Raises GaveUp.
    """
    planned = make_plan(units, folder, config.memory_bytes)
    run(find_pairs, key_ranges(planned))
    run(find_clusters, [Join(planned, "duplicates by unit")])
    return Duplicates(Path(planned))
