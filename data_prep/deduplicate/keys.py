"""What the documents of a unit are compared by, and the file of it that a unit leaves for the exchange.

Design choices:
- A document has a key of each kind: kind 0 is its whole text, the kinds above are the bands of its MinHash signature.
  Documents with one key alike are duplicates, whatever the kind. Where sources are kept apart, the source's name is
  part of every key.
- Texts are the same if they are after Unicode's form NFC, with every run of white space as one space and none at the
  ends. Letter case and punctuation count.
- A file holds the keys of each kind sorted, so that whoever compares a range of keys finds its part of every unit in
  one place. A key that several rows have stands there with the first of them; the others are in `repeats`, already
  paired. So one key takes one place a unit at most, however many documents are the same empty page.
- Rows are the documents of the unit that reach deduplication, numbered from 0.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data_prep.deduplicate.config import DeduplicateConfig
from megatrain.data_prep.deduplicate.minhash import band_keys
from megatrain.data_prep.deduplicate.words import Bools, Int64, UInt64, mix
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.files import AtomicFolder
from megatrain.errors import GaveUp

UInt32 = npt.NDArray[np.uint32]

KEYS = "documents.keys"
"""The file's name in a unit's folder."""
MAGIC = int.from_bytes(b"mtkeys01", "little")
HEAD = 6
"""Numbers before the counts of the kinds: MAGIC, digest, rows, repeats by text, repeats by bands, kinds."""
EXACT = 0
"""The kind that is the whole text."""


@dataclass(frozen=True)
class Keys:
    """Of a batch of documents, in order.

    text: uint64[documents, 2], the 128-bit hash of the text; [documents, 0] where it isn't compared. bands:
    uint64[documents, bands]. has_words: bool[documents], false where a document's bands say nothing.
    """

    text: UInt64
    bands: UInt64
    has_words: Bools


@dataclass(frozen=True)
class Kind:
    """The keys of one kind in a unit, ascending, each once.

    key: uint64[keys]. row: uint32[keys], the first that has it. check: uint64[keys], the second half of the keys of
    EXACT, which have 128 bits; empty for the others.
    """

    key: UInt64
    row: UInt32
    check: UInt64


@dataclass(frozen=True)
class UnitKeys:
    """What a file of keys holds; its arrays are mapped, not read.

    rows: how many documents. digest: of the rest of the file. exact_repeats, fuzzy_repeats: uint32[pairs, 2], a row
    and the first row of the unit that is like it.
    """

    rows: int
    digest: int
    kinds: Sequence[Kind]
    exact_repeats: UInt32
    fuzzy_repeats: UInt32


def document_keys(documents: Documents, config: DeduplicateConfig) -> Keys:
    """What these are compared by."""
    count = len(documents)
    text = np.zeros((count, 0), np.uint64)
    bands, has_words = text, np.zeros(count, np.bool_)
    if config.exact:
        text = np.frombuffer(b"".join(map(_text_digest, documents.texts)), "<u8").reshape(count, 2)
    if config.fuzzy.enabled:
        bands, has_words = band_keys(documents.texts, config.fuzzy)
    if not config.across_sources:
        source = source_hashes(documents)[:, None]
        text, bands = mix(text ^ source), mix(bands ^ source)
    return Keys(text, bands, has_words)


def source_hashes(documents: Documents) -> UInt64:
    """The hash of each document's source, uint64[documents]."""
    names = [name or "" for name in documents.column("source")]
    found = {name: xxhash.xxh3_64_intdigest(name.encode()) for name in set(names)}
    return np.array([found[name] for name in names], np.uint64)


def alike(keys: UInt64, checks: UInt64) -> tuple[Int64, Int64]:
    """Where each key is first, by ascending key: int64[keys]; and int64[pairs, 2], where it is again, and first.

    checks: the second halves of the keys, or empty.
    """
    order = np.lexsort((checks, keys)) if len(checks) else np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), np.bool_)
    is_first[1:] = keys[order[1:]] != keys[order[:-1]]
    if len(checks):
        is_first[1:] |= checks[order[1:]] != checks[order[:-1]]
    firsts, again = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    return order[firsts], order[np.stack([again, firsts[np.searchsorted(firsts, again) - 1]], 1)]


def write_keys(result: AtomicFolder, batches: Sequence[Keys]) -> None:
    """Writes the keys of a unit's documents, all batches in order, as a file of its results."""
    text, bands, has_words = (
        np.concatenate([getattr(keys, name) for keys in batches] or [np.zeros((0, 0), np.uint64)])
        for name in ("text", "bands", "has_words")
    )
    rows = np.arange(len(has_words), dtype="<u4")
    none = np.zeros(0, np.uint64)
    columns = [(text[:, 0], rows, text[:, 1])] if text.shape[1] else [(none, rows, none)]
    columns += [(band[has_words], rows[has_words], none) for band in bands.T]
    kinds, repeats = [], []
    for keys, row, checks in columns:
        firsts, pairs = alike(keys, checks)
        kinds.append(Kind(keys[firsts], row[firsts], checks[firsts] if len(checks) else none))
        repeats.append(row[pairs])
    exact_repeats = repeats[EXACT]
    fuzzy_repeats = np.unique(np.concatenate([rows[:0].reshape(0, 2), *repeats[1:]]).view("<u8"))
    arrays = [kind.key for kind in kinds] + [kinds[EXACT].check] + [kind.row for kind in kinds]
    counts = [len(rows), len(exact_repeats), len(fuzzy_repeats), len(kinds), *(len(kind.key) for kind in kinds)]
    parts = [np.array(counts, "<u8"), *arrays, exact_repeats, fuzzy_repeats]
    data = b"".join(part.tobytes() for part in parts)
    file = result.file(KEYS)
    file.write(np.array([MAGIC, xxhash.xxh3_64_intdigest(data)], "<u8").tobytes())
    file.write(data)


def read_keys(folder: Path) -> UnitKeys:
    """The keys of the unit whose results are in `folder`, mapped. Raises GaveUp where it isn't whole."""
    path = folder / KEYS
    try:
        data = np.memmap(path, np.uint8, "r")
        head = data[: HEAD * 8].view("<u8").tolist()
        counts = data[HEAD * 8 : (HEAD + head[5]) * 8].view("<u8").tolist() if head[0] == MAGIC else []
        sizes = [8 * count for count in counts + counts[:1]] + [4 * count for count in counts]
        sizes += [8 * head[3], 8 * head[4]]
        ends = np.cumsum([(HEAD + len(counts)) * 8, *sizes])
        if not counts or ends[-1] != len(data):
            raise ValueError("it isn't a whole file of keys")
    except (OSError, ValueError, IndexError) as error:
        raise GaveUp(f"{path}: can't be read: {error}") from None
    parts = [data[start:end] for start, end in pairwise(ends.tolist())]
    keys = [part.view("<u8") for part in parts[: len(counts)]]
    rows = [part.view("<u4") for part in parts[len(counts) + 1 : -2]]
    checks = [parts[len(counts)].view("<u8"), *(keys[0][:0] for _ in counts[1:])]
    exact, fuzzy = (part.view("<u4").reshape(-1, 2) for part in parts[-2:])
    return UnitKeys(head[2], head[1], [Kind(*kind) for kind in zip(keys, rows, checks, strict=True)], exact, fuzzy)


def _text_digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(" ".join(unicodedata.normalize("NFC", text).split()).encode())
