"""`megatrain prep` against the plainest pipeline on Hugging Face tokenizers: encode_batch and a write of the raw ids.

Design choices:
- The same text (the Python sources of this installation, a document a file, as .jsonl) and the same vocabulary (trained
  on it). The plain pipeline reads the lines, encodes, adds EOS, writes uint16 and the lengths; no shards, hashes,
  metadata, held-out split or checks of the input.
- One worker in this process and one thread: what is compared is work, not how many cores do it. encode_batch_fast,
  which leaves out the offsets, is a contender of its own.
- The ids have to be the same: the count of tokens is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.common import Bar, Result, main, rate, row, take_turns
from megatrain.data_prep import pipeline, tokenizer
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from megatrain.errors import DONE

VOCAB_SIZE = 16_384
TRAIN_BYTES = 4_000_000
BATCH_DOCUMENTS = 256
METHODS = ("encode_batch", "encode_batch_fast")
TARGET = 1.5
"""How many times as fast as the plain pipeline."""


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each contender."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = write_text(folder / "text.jsonl", arguments.megabytes * 1_000_000) / 1e6
        vocabulary = tokenizer.train(_first(read_text(folder / "text.jsonl"), TRAIN_BYTES), VOCAB_SIZE)
        (folder / "tokenizer.json").write_bytes(vocabulary.data)
        write_raw = {method: partial(encode, folder, vocabulary.eos_id, method) for method in METHODS}
        work: dict[str, Callable[[], int]] = {**write_raw, "megatrain prep": partial(prep, folder)}
        if len(tokens := {make() for make in work.values()}) != 1:
            raise AssertionError(f"the contenders differ in how many tokens they make: {tokens}")
        contenders = {each: partial(rate, partial(_megabytes, make, megabytes)) for each, make in work.items()}
        rates = take_turns(contenders, arguments.rounds)
    base = rates["encode_batch"]
    rows = [row(each, rates[each], base, "MB/CPU s") for each in contenders]
    ratio = statistics.median(rates["megatrain prep"]) / statistics.median(base)
    return Result(rows, [Bar("prep, times the speed of encode_batch and a raw write", ratio, TARGET)])


def write_text(path: Path, size: int) -> int:
    """Writes a record for each source file until they have `size` bytes; their bytes."""
    written = 0
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            with contextlib.suppress(UnicodeDecodeError):
                text = source.read_text()
                if text.strip():
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text.encode())
            if written >= size:
                break
    return written


def read_text(path: Path) -> Iterator[str]:
    """The documents."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


def prep(folder: Path) -> int:
    """Runs `megatrain prep`; the tokens it made."""
    output = folder / "shards"
    shutil.rmtree(output, ignore_errors=True)
    config = PrepConfig(
        input=str(folder / "text.jsonl"),
        output=str(output),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer.json")),
        workers=1,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        if pipeline.run(config) != DONE:
            raise AssertionError((output / "report.json").read_text())
    return sum(json.loads((output / "report.json").read_text())["tokens"].values())


def encode(folder: Path, eos_id: int, method: str) -> int:
    """Encodes by a method of Tokenizer and writes, without anything else; the tokens it made."""
    encode_batch = getattr(Tokenizer.from_file(str(folder / "tokenizer.json")), method)
    texts = read_text(folder / "text.jsonl")
    tokens = 0
    with (folder / "tokens.bin").open("wb") as ids_file, (folder / "lengths.bin").open("wb") as lengths_file:
        while batch := list(itertools.islice(texts, BATCH_DOCUMENTS)):
            documents = [[*found.ids, eos_id] for found in encode_batch(batch, add_special_tokens=False)]
            ids = np.fromiter(itertools.chain.from_iterable(documents), np.uint16)
            ids.tofile(ids_file)
            np.array([len(document) for document in documents], np.uint32).tofile(lengths_file)
            tokens += len(ids)
    return tokens


def _megabytes(work: Callable[[], int], megabytes: float) -> float:
    """Does the work; the size of the text."""
    work()
    return megabytes


def _first(texts: Iterator[str], size: int) -> Iterator[str]:
    """The first texts, of about `size` characters."""
    total = 0
    for text in texts:
        if total >= size:
            return
        total += len(text)
        yield text


if __name__ == "__main__":
    sys.exit(main("Preparing text, one worker", measure, megabytes=5, rounds=3))
