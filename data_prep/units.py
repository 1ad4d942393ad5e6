"""What a worker does with a unit of the input: read, tokenize, and leave the result in files.

Design choices:
- `prepare` depends on its arguments alone, so any worker may run any unit, in any order.
- The result goes through files (an Arrow stream for each split, a row a document): a unit may be larger than memory,
  and nothing large is sent between processes.
- Held out is what the hash of a document's text says: the same wherever the document lies in the input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from megatrain.data.format import HELD_OUT, TRAIN, id_dtype_name
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Unit
from megatrain.data_prep.read.reader import read_unit
from megatrain.data_prep.read.records import Problem
from megatrain.data_prep.shards import AtomicFile
from megatrain.data_prep.splits import METADATA
from megatrain.data_prep.tokenizer import Encoder, Vocabulary

SPLITS = (TRAIN, HELD_OUT)


@dataclass(frozen=True)
class StoredTokenizer:
    """The tokenizer.json of a set, where it lies, and what encodes by it."""

    path: str
    sha256: str
    eos_id: int
    vocab_size: int
    backend: str


@dataclass(frozen=True)
class Settings:
    """What `prepare` needs besides the unit."""

    tokenizer: StoredTokenizer
    columns: ColumnsConfig
    read: ReadConfig
    source: str | None
    language: str | None
    held_out_share: float


@dataclass
class Counts:
    """What was found in the input, or in a part of it. Problems by file and kind; broken files with the reason."""

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    problems: dict[str, Counter[str]] = field(default_factory=dict)
    first_problem: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        """Adds what a later part of the input held."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        for name, kinds in other.problems.items():
            self.problems[name] = self.problems.get(name, Counter()) + kinds
        self.first_problem = other.first_problem | self.first_problem
        self.broken |= other.broken

    def add_problem(self, name: str, problem: Problem) -> None:
        """Counts a bad record of the file `name`."""
        self.problems.setdefault(name, Counter())[problem.kind] += 1
        self.first_problem.setdefault(problem.kind, problem.place)

    def add_broken(self, name: str, why: str) -> None:
        """Notes a file that gives nothing."""
        self.broken[name] = why

    @property
    def bad(self) -> int:
        """Records that can't be used."""
        return sum(kinds.total() for kinds in self.problems.values())


def result_path(folder: Path, number: int, split: str) -> Path:
    """Where `prepare` leaves the documents of unit `number`."""
    return folder / f"{number:08d}.{split}.arrow"


def prepare(numbered: tuple[int, Unit], settings: Settings, folder: Path) -> Counts:
    """Tokenizes a unit. Its documents are then in `result_path`, for each split; a broken file leaves none."""
    number, unit = numbered
    counts = Counts()
    unit_documents = read_unit(unit, settings.columns, settings.read, counts.add_problem, counts.add_broken)
    with ExitStack() as stack:
        files = {split: stack.enter_context(AtomicFile(result_path(folder, number, split))) for split in SPLITS}
        schema = _schema(settings)
        streams = {split: stack.enter_context(pa.ipc.new_stream(file, schema)) for split, file in files.items()}
        for documents in unit_documents:
            for split, batch in _tokenize(documents, settings, counts).items():
                streams[split].write_batch(batch)
    return counts


def results(folder: Path, number: int, split: str) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], Any]]:
    """The documents of a prepared unit: ids [tokens], lengths [documents] and a batch of METADATA, in turn."""
    with pa.memory_map(str(result_path(folder, number, split))) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            ids = batch.column("ids")
            lengths = np.diff(ids.offsets.to_numpy()).astype("<u4")
            yield ids.values.to_numpy(), lengths, batch.select(METADATA.names)


def _tokenize(documents: Documents, settings: Settings, counts: Counts) -> dict[str, pa.RecordBatch]:
    """Documents as a batch for each split that has any."""
    encoded = _encoder(settings.tokenizer).encode(documents.texts)
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index, document in enumerate(documents.texts):
        text = document.encode()
        held_out = is_held_out(text, settings.held_out_share)
        chosen[HELD_OUT if held_out else TRAIN].append(index)
        counts.text_bytes += len(text)
    batches = {}
    for split, indices in chosen.items():
        if not indices:
            continue
        ids = [encoded[index] for index in indices]
        offsets = np.cumsum([0, *(len(document) for document in ids)])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(ids)))
        rows = documents.batch.take(indices)
        defaults = {"source": settings.source, "language": settings.language}
        arrays = [
            rows.column(name) if (default := defaults.get(name)) is None else pc.fill_null(rows.column(name), default)
            for name in METADATA.names
        ]
        batches[split] = pa.RecordBatch.from_arrays([lists, *arrays], schema=_schema(settings))
        counts.documents[split] += len(indices)
        counts.tokens[split] += int(offsets[-1])
    return batches


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document, in UTF-8, is among the `share` that is never trained on."""
    return xxhash.xxh3_64_intdigest(text) < share * 2**64


def _schema(settings: Settings) -> pa.Schema:
    id_type = pa.from_numpy_dtype(np.dtype(id_dtype_name(settings.tokenizer.vocab_size)))
    return pa.schema([("ids", pa.large_list(id_type)), *METADATA])


@lru_cache(maxsize=1)
def _encoder(stored: StoredTokenizer) -> Encoder:
    """Made once a process."""
    return Encoder(Vocabulary(Path(stored.path).read_bytes(), stored.eos_id, stored.vocab_size), stored.backend)
