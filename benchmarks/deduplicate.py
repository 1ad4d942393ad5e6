"""Deduplication and screening against datatrove's: MinHash signatures, and personal data.

    python -m benchmarks.deduplicate [--input DIR] [--megabytes N]

Design choices:
- The same documents, one thread. datatrove's classes are used as its pipelines use them, without reading and writing:
  shingles and signature of each document (5-grams of words, 14 bands of 8); ours are the keys of batches of them, the
  bands' hashes included.
- Personal data: e-mail and public IP addresses are replaced; telephone numbers, which datatrove hasn't, cost extra.
- DIR holds Parquet files with a column `text` (benchmarks/corpus.py makes such); by default, the Python sources of this
  installation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasketch import MinHash
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.formatters.pii import PIIFormatter

from benchmarks.common import Bar, Result, main, rate, row, take_turns
from megatrain.data_prep.deduplicate.config import DeduplicateConfig, FuzzyConfig
from megatrain.data_prep.deduplicate.keys import document_keys
from megatrain.data_prep.deduplicate.paragraphs import line_keys
from megatrain.data_prep.documents import SCHEMA, Documents
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.screening.config import Found, PersonalDataConfig
from megatrain.data_prep.screening.personal_data import PersonalData

BATCH_CHARACTERS = 1 << 22
LONGEST = 500_000
"""Characters; spaCy, which datatrove cuts words with, refuses a million."""
TARGET = 8.0
MINHASH, OURS = "MinHash, datatrove", "MinHash, megatrain"


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each contender."""
    texts = read_texts(arguments.input, arguments.megabytes * 1_000_000)
    batches = in_batches(texts)
    with tempfile.TemporaryDirectory() as folder:
        work: dict[str, Callable[[], None]] = {
            MINHASH: partial(datatrove_signatures, folder, texts),
            "MinHash, datasketch": partial(datasketch_signatures, texts),
            OURS: partial(keys, batches, DeduplicateConfig(fuzzy=FuzzyConfig(enabled=True))),
            "same text, megatrain": partial(keys, batches, DeduplicateConfig(exact=True)),
            "lines, megatrain": partial(lines, batches),
            "e-mail and IP, datatrove": partial(datatrove_personal_data, PIIFormatter(), texts),
            "e-mail and IP, megatrain": partial(personal_data, batches, Found.keep),
            "e-mail, IP and phone, megatrain": partial(personal_data, batches, Found.replace),
        }
        contenders = {name: partial(rate, partial(done, each, len(texts))) for name, each in work.items()}
        rates = take_turns(contenders, arguments.rounds)
    bases = {name: rates["e-mail and IP, datatrove" if name.startswith("e-mail") else MINHASH] for name in rates}
    rows = [row(name, rates[name], bases[name], "documents/CPU s") for name in contenders]
    ratio = statistics.median(rates[OURS]) / statistics.median(rates[MINHASH])
    return Result(rows, [Bar("MinHash, times datatrove's speed", ratio, TARGET)])


def read_texts(folder: str, size: int) -> list[str]:
    """Documents of about `size` characters in all, from all files of a folder alike."""
    if not folder:
        sources = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
        found = (path.read_text(errors="replace") for path in sources)
        files = [[text for text in found if 0 < len(text) <= LONGEST]]
    else:
        paths = sorted(Path(folder).glob("*.parquet"))
        files = [pq.read_table(path, columns=["text"])["text"].to_pylist() for path in paths]
    texts = []
    for file in files:
        left = size // len(files)
        for text in file:
            if left > 0 and 0 < len(text) <= LONGEST:
                texts.append(text)
                left -= len(text)
    return texts


def in_batches(texts: Sequence[str]) -> list[Documents]:
    """The texts as the readers give them."""
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size + len(text) > BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return [_documents(batch) for batch in batches]


def datatrove_signatures(folder: str, texts: Sequence[str]) -> None:
    """Its default hash function, xxHash, of encoded strings: xxhash 4 refuses others, and it doesn't know yet."""
    step = MinhashDedupSignature(folder, MinhashConfig())
    step._hash_func = lambda shingle: xxhash.xxh64_intdigest(shingle.encode())
    for text in texts:
        if (shingles := step.get_shingles(text)).size:
            step.get_signature(shingles)


def datasketch_signatures(texts: Sequence[str]) -> None:
    """The same n-grams, of words between white space."""
    for text in texts:
        words = text.lower().split()
        signature = MinHash(num_perm=112)
        signature.update_batch([" ".join(words[first : first + 5]).encode() for first in range(max(1, len(words) - 4))])


def keys(batches: Sequence[Documents], config: DeduplicateConfig) -> None:
    """Those of documents."""
    for batch in batches:
        document_keys(_fresh(batch), config)


def lines(batches: Sequence[Documents]) -> None:
    """The keys of those of 80 characters or more."""
    for batch in batches:
        line_keys(_fresh(batch), DeduplicateConfig())


def datatrove_personal_data(formatter: PIIFormatter, texts: Sequence[str]) -> None:
    """Its defaults: e-mail and public IPv4 addresses."""
    for text in texts:
        formatter.format(text)


def personal_data(batches: Sequence[Documents], phone: Found) -> None:
    """The step, with telephone numbers or without."""
    step = PersonalData(PersonalDataConfig(Found.replace, Found.replace, phone))
    for batch in batches:
        step(_fresh(batch), Notes())


def done(work: Callable[[], None], documents: int) -> float:
    """Does the work; how many documents it was."""
    work()
    return documents


def _fresh(documents: Documents) -> Documents:
    """The same without what was computed of them before."""
    return Documents(documents.batch)


def _documents(texts: Sequence[str]) -> Documents:
    nulls = {field.name: [None] * len(texts) for field in SCHEMA}
    columns = nulls | {"id": [str(number) for number in range(len(texts))], "text": list(texts)}
    return Documents(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))


if __name__ == "__main__":
    sys.exit(main("Deduplication and screening", measure, megabytes=5, rounds=5, input=""))
