"""Best-fit packing against concatenation, on real documents: what is padded, what is cut, what reading costs.

Design choices:
- The documents are files of this installation (Python sources) through `megatrain prep`, or a set that is given.
- Padding is a share of all positions. A document is cut if no sample holds it whole; those longer than a sample always
  are, so they aren't counted.
- Reading is a shuffled epoch of one rank, up to the arrays that the objective gets; both packings read the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import Bar, Result, Row, main, rate, take_turns
from benchmarks.prep import documents, write_text, write_vocabulary
from benchmarks.prep_peers import prep
from megatrain.data.order import Int64
from megatrain.data.samples import SampleOrder, Source, open_sources
from megatrain.data_config import DataConfig, Packing

VOCAB_SIZE = 16_384
LENGTHS = (2048, 4096, 8192, 32768)
AT = 4096
"""The length that the bars are for."""
BATCH = 64
WITH_TARGETS, READS = 0.99, 0.5


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each length and packing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(arguments.set or make_set(Path(name), arguments.megabytes))
        rows: list[Row] = []
        for length in LENGTHS:
            rows += compare(DataConfig(path=str(folder), index_path=name), length, arguments.rounds)
    concat, best_fit = (row for row in rows if row["S"] == AT)
    ratio = float(best_fit["Mtok/CPU s"]) / float(concat["Mtok/CPU s"])
    return Result(
        rows,
        [
            Bar(
                f"best_fit, share of positions with a target at S={AT}",
                1 - float(best_fit["padded %"]) / 100,
                WITH_TARGETS,
            ),
            Bar(f"best_fit, times the reading speed of concat at S={AT}", ratio, READS),
        ],
    )


def make_set(folder: Path, megabytes: int) -> Path:
    """Prepares a set of the first so many MB of the Python sources."""
    texts = documents("")
    write_vocabulary(folder, texts, VOCAB_SIZE)
    write_text(folder, texts, megabytes)
    subprocess.run(prep(folder, folder / "shards"), check=True, stdout=subprocess.DEVNULL)
    return folder / "shards"


def compare(config: DataConfig, length: int, rounds: int) -> list[Row]:
    """The rows of both packings at a length."""
    sources = {packing: open_sources(replace(config, packing=packing), length)[0] for packing in Packing}
    lengths = document_lengths(sources[Packing.concat])
    contenders = {packing.value: partial(rate, partial(read, sources[packing])) for packing in Packing}
    rates = take_turns(contenders, rounds)
    return [
        {
            "S": length,
            "packing": packing.value,
            "samples": sources[packing].index.samples,
            "padded %": round(100 * sources[packing].index.padding_share, 3),
            "cut %": round(100 * cut_share(sources[packing], lengths), 2),
            "Mtok/CPU s": round(statistics.median(rates[packing.value]), 1),
        }
        for packing in Packing
    ]


def document_lengths(source: Source) -> Int64:
    """The tokens of all documents of a set, in order."""
    members = range(len(source.members))
    starts = [source.reader.starts(member) + source.members.first_token[member] for member in members]
    return np.diff(np.concatenate([*starts, source.members.first_token[-1:]]))


def cut_share(source: Source, lengths: Int64) -> float:
    """The share, of the documents that fit into a sample, of those that no sample holds whole."""
    pieces = source.index.locate(np.arange(source.index.samples))
    by_start = np.argsort(pieces.start)
    start, stop = pieces.start[by_start], pieces.stop[by_start]
    end = np.cumsum(lengths)
    begin = end - lengths
    whole = stop[np.searchsorted(start, begin, side="right") - 1] >= end
    fitting = (lengths > 1) & (lengths <= source.index.sequence_length + 1)
    return int((fitting & ~whole).sum()) / max(1, int(fitting.sum()))


def read(source: Source) -> float:
    """Million tokens read: an epoch, padding not counted."""
    order = SampleOrder([source], seed=0)
    tokens = 0
    for first in range(0, source.index.samples, BATCH):
        raw = order.read(np.arange(first, min(first + BATCH, source.index.samples)))
        tokens += int((raw.length - 1).sum())
    return tokens / 1e6


if __name__ == "__main__":
    sys.exit(main("Packing documents into samples", measure, megabytes=20, rounds=5, set=""))
