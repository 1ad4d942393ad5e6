"""The n-grams of the texts that models are evaluated on, in files that all workers map.

Design choices:
- A text's n-grams are of `ngram` words; a shorter text is one n-gram of all its words. Words are those of
  deduplicate/words.py: lower case, no punctuation, all digits alike.
- In scripts without spaces a word is a character, and texts of mostly such words are looked for by twice as many.
- The n-grams of all lengths are in one sorted list of hashes with the number of a text that has them. A table of what
  their first bits are says no to nearly all that isn't there, so few are searched for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data_prep.deduplicate.words import Bools, Int64, UInt64, alone_share, mix, ngrams, words
from megatrain.data_prep.files import AtomicFolder, said
from megatrain.data_prep.screening.config import DecontaminateConfig
from megatrain.errors import GaveUp, InputError, bad_value

HASHES, TEXTS, TABLE, NAMES = "hashes", "texts", "table", "names.json"
LEAST_BITS, MOST_BITS = 16, 26
"""Of a hash, by which the table is looked up."""
PLACES_A_GRAM = 8
"""Of the table."""


def build_index(config: DecontaminateConfig, folder: Path) -> Path:
    """Makes the index in a folder of its own below `folder`, if it isn't there, and gives that.

    Raises InputError for an evaluation set that can't be read, or that holds nothing to look for.
    """
    settings = {name: asdict(config)[name] for name in ("files", "keys", "ngram", "min_words")}
    digest = xxhash.xxh3_128(json.dumps(settings).encode())
    for name in config.files:
        digest.update(_bytes(name))
    path = folder / digest.hexdigest()
    if path.exists():
        return path
    names: list[str] = []
    grams: list[UInt64] = []
    lengths: set[int] = set()
    for name in config.files:
        before = len(grams)
        for place, text in _texts(name, config.keys):
            found, length = _grams(text, config)
            if length:
                grams.append(found)
                names.append(f"{name}:{place}")
                lengths.add(length)
        if len(grams) == before:
            raise bad_value("decontaminate.files", name, f"holds no text of {config.min_words} words or more")
    hashes, first = np.unique(np.concatenate(grams), return_index=True)
    texts = np.repeat(np.arange(len(grams), dtype=np.uint32), [len(found) for found in grams])[first]
    table = np.zeros(1 << int(np.clip(np.ceil(np.log2(PLACES_A_GRAM * len(hashes))), LEAST_BITS, MOST_BITS)), np.bool_)
    table[_first_bits(hashes, len(table))] = True
    with AtomicFolder(path) as result:
        result.file(HASHES).write(hashes.tobytes())
        result.file(TEXTS).write(texts.tobytes())
        result.file(TABLE).write(table.tobytes())
        result.file(NAMES).write(json.dumps(names).encode())
        result.commit(path.name, {"lengths": sorted(lengths)})
    return path


class Index:
    """What build_index made, mapped."""

    def __init__(self, path: Path) -> None:
        """Raises GaveUp where it isn't whole."""
        try:
            self.lengths: list[int] = said(path)["lengths"]
            self._hashes = np.memmap(path / HASHES, np.uint64, "r")
            self._texts = np.memmap(path / TEXTS, np.uint32, "r")
            self._table = np.memmap(path / TABLE, np.bool_, "r")
        except (OSError, ValueError, KeyError) as error:
            raise GaveUp(f"{path}: can't be read: {error}") from None
        self._path = path

    @cached_property
    def names(self) -> list[str]:
        """FILE:LINE of each text."""
        names: list[str] = json.loads((self._path / NAMES).read_bytes())
        return names

    def find(self, grams: UInt64, length: int) -> tuple[Int64, npt.NDArray[np.uint32]]:
        """Which of the n-grams of a length are in the index, and a text of each that is."""
        hashes = _with_length(grams, length)
        maybe = np.flatnonzero(self._table[_first_bits(hashes, len(self._table))])
        at = np.minimum(np.searchsorted(self._hashes, hashes[maybe]), len(self._hashes) - 1)
        is_there: Bools = self._hashes[at] == hashes[maybe]
        return maybe[is_there], np.array(self._texts[at[is_there]])


def _grams(text: str, config: DecontaminateConfig) -> tuple[UInt64, int]:
    """What a text is looked for by, and the words of each; no words: it isn't."""
    hashes, starts = words([text])
    times = 2 if alone_share(text) > 0.5 else 1
    if len(hashes) < config.min_words * times:
        return hashes[:0], 0
    length = min(len(hashes), config.ngram * times)
    return _with_length(ngrams(hashes, starts, length)[0], length), length


def _with_length(grams: UInt64, length: int) -> UInt64:
    return mix(grams + np.uint64(length))


def _first_bits(hashes: UInt64, places: int) -> UInt64:
    return hashes >> np.uint64(64 - (places.bit_length() - 1))


def _texts(name: str, keys: list[str]) -> Iterator[tuple[int, str]]:
    """The texts of an evaluation set, with the number of their line."""
    suffix = Path(name).suffix
    if suffix not in (".txt", ".jsonl"):
        raise bad_value("decontaminate.files", name, "a .txt or a .jsonl file")
    for number, line in enumerate(_bytes(name).split(b"\n"), 1):
        try:
            if suffix == ".txt":
                yield number, line.decode()
            elif line.strip():
                yield from ((number, text) for text in _strings(json.loads(line), keys))
        except (ValueError, RecursionError) as error:
            raise InputError(f"decontaminate.files={name}: line {number}: {error}") from None


def _strings(record: Any, keys: list[str]) -> list[str]:
    """All strings that a record holds under the keys. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("it isn't an object")
    values = [record[key] for key in keys if key in record]
    strings = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) for text in strings):
        raise ValueError("a text isn't a string or a list of strings")
    return strings


def _bytes(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise bad_value("decontaminate.files", name, f"can't be read: {error.strerror}") from None
