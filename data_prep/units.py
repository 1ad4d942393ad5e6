"""What is done with a unit of the input, by whatever process an executor gives it to.

`prepare` reads a unit and takes its documents through the steps. Where nothing has to be compared across units it makes
their ids too, and no text is written. Else it leaves the documents and what they are compared by, and `finish` follows,
which leaves out what was found elsewhere and makes the ids of the rest.

Design choices:
- A task depends on its arguments alone, so any process may run any task, in any order, twice.
- Results are folders named by what they are a function of: the input's bytes, as far as names, sizes and times tell,
  and the settings. A task whose folder is there and whole does nothing, so to start again is to go on.
- Held out is what the hash of a document's text says: the same wherever the document lies in the input.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from megatrain.data.format import HELD_OUT, TRAIN
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.counts import Amount, Counts
from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.duplicates import Duplicates
from megatrain.data_prep.deduplicate.keys import Keys, document_keys, write_keys
from megatrain.data_prep.deduplicate.paragraphs import LineKeys, line_keys, write_line_keys
from megatrain.data_prep.deduplicate.steps import RemovedDocuments, RepeatedLines
from megatrain.data_prep.documents import SCHEMA, Documents
from megatrain.data_prep.files import AtomicFolder, is_whole, said
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.read.files import Unit
from megatrain.data_prep.read.reader import read_unit
from megatrain.data_prep.results import METADATA, Done, ResultsWriter
from megatrain.data_prep.step import Step
from megatrain.data_prep.steps import steps
from megatrain.data_prep.tokenizer import TOKENIZERS, Encoder, Vocabulary

SPLITS = (TRAIN, HELD_OUT)
TEXTS = "documents.arrow"
"""What a prepared unit leaves where units are compared."""


@dataclass(frozen=True)
class StoredTokenizer:
    """The tokenizer.json of a set, where it lies, and what encodes by it."""

    path: str
    sha256: str
    eos_id: int
    vocab_size: int
    backend: str


@dataclass(frozen=True)
class UnitTask:
    """key: what the results are a function of. folder: where they go. source: of documents that don't name theirs."""

    key: str
    folder: str
    unit: Unit
    source: str | None

    @property
    def name(self) -> str:
        """The files."""
        return " and ".join(dict.fromkeys(piece.name for piece in self.unit))

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return sum(piece.size for piece in self.unit)


@dataclass(frozen=True)
class Settings:
    """What tasks need besides the unit. evaluation_index: of decontaminate.files, if there are any."""

    config: PrepConfig
    tokenizer: StoredTokenizer
    evaluation_index: str | None = None


@dataclass(frozen=True)
class FinishTask:
    """key: what the results are a function of. folder: where they go. prepared: the unit; number: which one it is.

    duplicates: the folder of what was found among all units' documents, if they were compared. repeated: the file of
    what was found among their lines, if these were.
    """

    key: str
    folder: str
    prepared: UnitTask
    number: int
    duplicates: str | None
    repeated: str | None

    @property
    def name(self) -> str:
        """The files."""
        return self.prepared.name

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return self.prepared.size


def prepare(task: UnitTask, settings: Settings) -> Done:
    """Reads a unit and takes it through the steps; a broken file leaves nothing."""

    def work(result: AtomicFolder, counts: Counts, notes: Notes, tokenizer: StoredTokenizer) -> None:
        documents = _read(task, settings, counts, notes)
        if compares(settings.config.deduplicate):
            _keep(documents, settings.config.deduplicate, result)
        else:
            _tokenize(documents, settings.config, tokenizer, result, counts)

    return _once(task, settings, work)


def finish(task: FinishTask, settings: Settings) -> Done:
    """Leaves out what other units have of a prepared unit, and tokenizes the rest."""

    def work(result: AtomicFolder, counts: Counts, notes: Notes, tokenizer: StoredTokenizer) -> None:
        taken: list[Step] = []
        duplicates = None if task.duplicates is None else Duplicates(Path(task.duplicates))
        if duplicates is not None:
            taken.append(RemovedDocuments(duplicates, task.number))
        if task.repeated is not None:
            repeated = Path(task.repeated)
            taken.append(RepeatedLines(repeated, duplicates, task.number, settings.config.deduplicate))
        kept = (through(taken, documents, notes) for documents in _kept(Path(task.prepared.folder)))
        left = (documents for documents in kept if len(documents))
        _tokenize(left, settings.config, tokenizer, result, counts)

    return _once(task, settings, work)


class _IdsDifferError(Exception):
    """So many of the documents that were compared have other ids than tokenizers gives."""

    def __init__(self, compared: int, different: int) -> None:
        super().__init__(compared, different)
        self.compared, self.different = compared, different


Work = Callable[[AtomicFolder, Counts, Notes, StoredTokenizer], None]


def _once(task: UnitTask | FinishTask, settings: Settings, work: Work) -> Done:
    """Does the work of a task, unless it was done before; with tokenizers, where what is faster gives other ids."""
    folder = Path(task.folder)
    if is_whole(folder, task.key):
        total = Counts.from_json(said(folder)["counts"]).total()
        return Done(total.documents, total.tokens)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return _do(task, work, settings.tokenizer, Counts())
    except _IdsDifferError as error:
        found = Counts(compared=error.compared, different=error.different)
        return _do(task, work, replace(settings.tokenizer, backend=TOKENIZERS), found)


def _do(task: UnitTask | FinishTask, work: Work, tokenizer: StoredTokenizer, counts: Counts) -> Done:
    notes = Notes()
    with AtomicFolder(Path(task.folder)) as result:
        work(result, counts, notes, tokenizer)
        result.commit(task.key, {"counts": counts.to_json(), "notes": notes.to_json()})
    total = counts.total()
    return Done(total.documents, total.tokens)


def compares(config: DeduplicateConfig) -> bool:
    """Whether documents of other units have a say in what stays."""
    return config.exact or config.fuzzy.enabled or config.paragraphs.enabled


def _keep(batches: Iterable[Documents], config: DeduplicateConfig, result: AtomicFolder) -> None:
    """Leaves documents, and what they are compared by."""
    keys: list[Keys] = []
    lines: list[LineKeys] = []
    with pa.ipc.new_stream(result.file(TEXTS), SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        for documents in batches:
            stream.write_batch(documents.batch)
            if config.exact or config.fuzzy.enabled:
                keys.append(document_keys(documents, config))
            if config.paragraphs.enabled:
                lines.append(line_keys(documents, config))
    if config.exact or config.fuzzy.enabled:
        write_keys(result, keys)
    if config.paragraphs.enabled:
        write_line_keys(result, lines)


def kept_texts(folder: Path, rows: Collection[int]) -> dict[int, tuple[str, str]]:
    """Ids and texts of some rows of what a prepared unit left."""
    found, first = {}, 0
    for documents in _kept(folder):
        for row in rows:
            if first <= row < first + len(documents):
                name, text = (documents.batch.column(column)[row - first].as_py() for column in ("id", "text"))
                found[row] = name, text
        first += len(documents)
    return found


def _kept(folder: Path) -> Iterator[Documents]:
    """What _keep left, in the same batches."""
    with pa.memory_map(str(folder / TEXTS)) as file, pa.ipc.open_stream(file) as stream:
        yield from map(Documents, stream)


def _read(task: UnitTask, settings: Settings, counts: Counts, notes: Notes) -> Iterator[Documents]:
    """The documents that every step lets pass."""
    config, taken = settings.config, _process_steps(settings)
    for documents in read_unit(task.unit, config.columns, config.read, counts.add_problem, counts.add_broken):
        counts.records += len(documents)
        named = _with_names(documents, task.source or config.source, config.language)
        if len(left := through(taken, named, notes)):
            yield left


def through(taken: Iterable[Step], documents: Documents, notes: Notes) -> Documents:
    """What is left of documents after the steps."""
    for step in taken:
        if not len(documents):
            break
        documents = step(documents, notes)
    return documents


def _with_names(documents: Documents, source: str | None, language: str | None) -> Documents:
    for name, value in (("source", source), ("language", language)):
        if value is not None:
            column = documents.batch.column(name)
            documents = documents.with_column(name, pc.fill_null(column, value))
    return documents


def _tokenize(
    batches: Iterable[Documents], config: PrepConfig, stored: StoredTokenizer, result: AtomicFolder, counts: Counts
) -> None:
    """Leaves the ids of documents. Raises _IdsDifferError where they aren't those of tokenizers."""
    encoder, writer = _encoder(stored), ResultsWriter(result)
    compared: list[tuple[int, str]] = []
    for documents in batches:
        texts = documents.batch.column("text")
        ids, lengths = encoder.encode_batch(texts)
        digests = text_digests(texts)
        held_out = is_held_out(digests, config.held_out_share)
        metadata = documents.batch.select(METADATA.names)
        counts.add_lengths(lengths)
        for split, chosen in ((TRAIN, ~held_out), (HELD_OUT, held_out)):
            if chosen.any():
                rows = metadata.filter(pa.array(chosen))
                own = lengths[chosen]
                writer.add(split, ids if chosen.all() else ids[np.repeat(chosen, lengths)], own, rows)
                _count(counts, split, texts.filter(pa.array(chosen)), rows, own)
        if stored.backend != TOKENIZERS:
            # Those with the largest hashes: any would do, as long as they are always the same.
            largest = np.argsort(digests)[-config.tokenizer.parity_documents :].tolist()
            compared += [(int(digests[row]), texts[row].as_py()) for row in largest]
            compared = heapq.nlargest(config.tokenizer.parity_documents, compared)
    writer.close()
    if compared:
        counts.compared += len(compared)
        if different := encoder.check([text for _, text in compared]):
            raise _IdsDifferError(len(compared), different)


def _count(counts: Counts, split: str, texts: pa.Array, metadata: pa.RecordBatch, lengths: npt.NDArray[Any]) -> None:
    """Adds documents to the amounts of their source and language."""
    columns = {
        "source": metadata.column("source"),
        "language": metadata.column("language"),
        "bytes": pc.binary_length(texts),
        "characters": pc.utf8_length(texts),
        "words": pa.array(words(texts)),
        "tokens": pa.array(lengths, pa.int64()),
    }
    sums = [(name, "sum") for name in list(columns)[2:]]
    grouped = pa.table(columns).group_by(["source", "language"]).aggregate([("bytes", "count"), *sums])
    for row in grouped.to_pylist():
        amount = Amount(row["bytes_count"], *(row[f"{name}_sum"] for name, _ in sums))
        counts.amount(split, (row["source"], row["language"])).add(amount)


def words(texts: pa.Array) -> npt.NDArray[np.int64]:
    """Words between ASCII spaces of each text, int64[documents]. texts: large_string, none of them empty."""
    offsets, data = buffers(texts)
    space = data <= ord(" ")
    begins = np.empty(len(data), np.bool_)
    begins[1:] = space[:-1] & ~space[1:]
    begins[offsets[:-1]] = ~space[offsets[:-1]]
    return np.add.reduceat(begins, offsets[:-1], dtype=np.int64)


def text_digests(texts: pa.Array) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each text in UTF-8, uint64[documents]. texts: large_string, no nulls."""
    offsets, data = buffers(texts)
    bytes_ = data.data
    return np.array(
        [xxhash.xxh3_64_intdigest(bytes_[start:stop]) for start, stop in pairwise(offsets.tolist())], np.uint64
    )


def is_held_out(digests: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """Which documents are among the `share` that is never trained on, bool[documents]. digests: of their texts."""
    limit = int(share * 2**64)
    return digests < np.uint64(limit)


def buffers(texts: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Where each text begins, int64[documents + 1], in their UTF-8, uint8[bytes]. texts: large_string, no nulls."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64, len(texts) + 1, texts.offset * 8)
    bytes_ = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    return ends - ends[0], bytes_[ends[0] : ends[-1]]


_STEPS: dict[str, list[Step]] = {}


def _process_steps(settings: Settings) -> list[Step]:
    """The steps, made once a process: some read files."""
    key = repr(settings)
    if key not in _STEPS:
        _STEPS.clear()
        index = settings.evaluation_index
        _STEPS[key] = steps(settings.config, None if index is None else Path(index))
    return _STEPS[key]


@lru_cache(maxsize=1)
def _encoder(stored: StoredTokenizer) -> Encoder:
    """Made once a process."""
    return Encoder(Vocabulary(Path(stored.path).read_bytes(), stored.eos_id, stored.vocab_size), stored.backend)
