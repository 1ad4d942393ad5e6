"""The tokenized documents of a unit, in files: what shards are cut from.

Design choices:
- For each split the ids of all documents one after the other, their lengths, and their metadata in another file each,
  as they are in memory: they are mapped, so a shard that is cut from many units holds none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megatrain.data.format import LENGTH_DTYPE
from megatrain.data_prep.files import AtomicFile, AtomicFolder

METADATA = pa.schema([(name, pa.string()) for name in ("id", "url", "source", "language", "metadata")])
"""What is kept of a document beside its tokens; all but id may be null, metadata is JSON."""


class Done(NamedTuple):
    """What a task says when it is done, or was done before."""

    documents: int
    tokens: int


class ResultsWriter:
    """Writes the documents of one unit into a folder that the caller commits. Ends when `close` was called."""

    def __init__(self, folder: AtomicFolder) -> None:
        self._folder = folder
        self._files: dict[str, tuple[AtomicFile, AtomicFile, pa.ipc.RecordBatchStreamWriter]] = {}

    def add(self, split: str, ids: npt.NDArray[Any], lengths: npt.NDArray[np.uint32], metadata: pa.RecordBatch) -> None:
        """Documents. ids: [tokens]; lengths: uint32[documents]; metadata: a row of METADATA each."""
        if split not in self._files:
            stream = pa.ipc.new_stream(self._folder.file(f"{split}.metadata"), METADATA)
            self._files[split] = self._folder.file(f"{split}.ids"), self._folder.file(f"{split}.lengths"), stream
        ids_file, lengths_file, stream = self._files[split]
        ids_file.write(ids.data)
        lengths_file.write(lengths.astype(LENGTH_DTYPE, copy=False).data)
        stream.write_batch(metadata)

    def close(self) -> None:
        """Ends the files."""
        for _, _, stream in self._files.values():
            stream.close()


class Results:
    """The documents of one split of a committed unit, mapped."""

    def __init__(self, folder: Path, split: str, id_dtype: np.dtype[Any]) -> None:
        self.lengths: npt.NDArray[np.uint32] = np.memmap(folder / f"{split}.lengths", LENGTH_DTYPE, "r")
        self._ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._ids = np.memmap(folder / f"{split}.ids", id_dtype, "r")
        with pa.memory_map(str(folder / f"{split}.metadata")) as file, pa.ipc.open_stream(file) as stream:
            self._metadata = stream.read_all()

    def ids(self, first: int, documents: int) -> npt.NDArray[Any]:
        """The ids of so many documents from number `first` on, one after the other."""
        return self._ids[self._ends[first] : self._ends[first + documents]]

    def metadata(self, first: int, documents: int) -> pa.Table:
        """Their metadata."""
        return self._metadata.slice(first, documents)


def has_split(folder: Path, split: str) -> bool:
    """Whether a committed unit has documents of a split."""
    return (folder / f"{split}.lengths").exists()
