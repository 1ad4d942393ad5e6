"""`megatrain prep` against the tools of the field: the same text and the same tokenizer, to ids on disk.

    python -m benchmarks.prep --input corpus/text [--megabytes 200] [--peers DIR]
    python -m benchmarks.prep --input corpus/text --scaling

Design choices:
- The text is the first so many MB of documents in the order of a hash of their ids: of all sources and languages
  (benchmarks/corpus.py fetches it). Without --input it is the Python sources of this installation.
- The vocabulary is trained on it, and has 32,000 ids, so that all write uint16.
- What is compared is CPU seconds of all processes of a tool, its start included: two cores that others use too leave
  wall seconds to chance. They stand beside it.
- The ids have to be the same, document by document: a sum of hashes, so their order doesn't count.
- Memory is the largest sum over a tool's processes of the pages that each has, shared ones by halves (PSS).
- A tool that isn't there has a row that says so, and its bar doesn't hold.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from benchmarks.common import Bar, Result, main
from benchmarks.prep_peers import (
    ALONE,
    DATATROVE,
    DOLMA,
    FOR_TOKENIZERS,
    MEGATRON,
    PREP,
    Contender,
    contenders,
    install_dolma,
    prep,
)
from megatrain.data.format import TOKENIZER
from megatrain.data_prep.tokenizer import EOS, train
from megatrain.errors import InputError

TRAIN_BYTES = 20_000_000
FILES = 8
SIZES = (50, 100, 200, 400)
"""MB of text whose costs should lie on a line."""
PR_SET_CHILD_SUBREAPER = 36
"""Of prctl: processes whose parent has ended become children of this one."""
MEMORY_SECONDS = 0.05
"""Between two looks at the memory."""


@dataclass(frozen=True)
class Cost:
    """Of a command: wall seconds, CPU seconds and the largest PSS in bytes of all its processes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Written:
    """digest: the sum of the hashes of documents mod 2^64. bytes: of the files that hold tokens and say where."""

    digest: int
    tokens: int
    bytes: int

    @property
    def bytes_a_token(self) -> float:
        """Rounded, for the table."""
        return round(self.bytes / self.tokens, 3)


def measure(arguments: argparse.Namespace) -> Result:
    """A row for each contender, or for each size."""
    texts = documents(arguments.input, SIZES[-1] if arguments.scaling else arguments.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vocabulary(folder, texts, arguments.vocab_size)
        if arguments.scaling:
            return scaling(folder, texts, arguments.rounds)
        megabytes = write_text(folder, texts, arguments.megabytes)
        return against_peers(folder, megabytes, Path(arguments.peers), arguments.rounds)


def documents(source: str, megabytes: int) -> Sequence[str]:
    """At least so many MB of text if there are, and TRAIN_BYTES.

    source: a folder of Parquet files, all of whose texts are given, in the order of a hash of their ids; or nothing,
    for the Python sources of this installation.
    """
    if not source:
        return list(_first(_sources(), max(megabytes * 1_000_000, TRAIN_BYTES)))
    table = pa.concat_tables(
        [pq.read_table(path, columns=["id", "text"]) for path in sorted(Path(source).glob("*.parquet"))]
    )
    order = sorted(
        range(len(table)), key=[xxhash.xxh3_64_intdigest(name.encode()) for name in table["id"].to_pylist()].__getitem__
    )
    return [text for text in table["text"].take(order).to_pylist() if EOS not in text]


def _sources() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text()
            if text.strip() and EOS not in text:
                yield text


def write_vocabulary(folder: Path, texts: Iterable[str], size: int) -> None:
    """TOKENIZER, its merges written as the tokenizers of dolma reads them, and FOR_TOKENIZERS."""
    tokenizer = json.loads(train(_first(texts, TRAIN_BYTES), size).data)
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / TOKENIZER).write_text(json.dumps(tokenizer))
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": []}
    (folder / FOR_TOKENIZERS).write_text(json.dumps(tokenizer))


def write_text(folder: Path, texts: Iterable[str], megabytes: int) -> float:
    """Writes the first so many MB of text in FILES files of Parquet and of JSON lines below `folder`; their MB."""
    chosen = list(_first(texts, megabytes * 1_000_000))
    for kind in ("parquet", "jsonl"):
        (folder / kind).mkdir(parents=True)
    for number in range(FILES):
        rows = [{"id": f"{number}/{row}", "text": text} for row, text in enumerate(chosen[number::FILES])]
        pq.write_table(pa.Table.from_pylist(rows), folder / "parquet" / f"{number}.parquet", row_group_size=1000)
        with (folder / "jsonl" / f"{number}.jsonl").open("w") as file:
            file.writelines(json.dumps(row | {"source": "benchmark"}) + "\n" for row in rows)
    return sum(len(text.encode()) for text in chosen) / 1e6


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first texts, of about `size` bytes."""
    total = 0
    for text in texts:
        if total >= size:
            return
        total += len(text.encode())
        yield text


def against_peers(folder: Path, megabytes: float, peers: Path, rounds: int) -> Result:
    """The contenders, which take turns."""
    missing = install_dolma(peers)
    running = [each for each in contenders(peers) if not (missing and each.name == DOLMA)]
    costs: dict[str, list[Cost]] = {each.name: [] for each in running}
    for _ in range(rounds):
        for each in running:
            costs[each.name].append(cost(each.command(folder, _gone(folder / each.name))))
    written = {each.name: inspect(each, folder / each.name) for each in running}
    if len({found.digest for found in written.values()}) != 1:
        raise AssertionError(f"the contenders differ in their ids: {written}")
    rows = [
        {**_row(name, megabytes, found), "bytes/token": written[name].bytes_a_token} for name, found in costs.items()
    ]
    if missing:
        rows.append({**dict.fromkeys(rows[0], "-"), "contender": f"{DOLMA}: {missing}"})
    return Result(rows, _bars(costs, written[PREP]))


def _row(name: str, megabytes: float, costs: Sequence[Cost]) -> dict[str, str | int | float]:
    rates = [megabytes / each.cpu_seconds for each in costs]
    return {
        "contender": name,
        "MB/CPU s": round(statistics.median(rates), 2),
        "lowest": round(min(rates), 2),
        "highest": round(max(rates), 2),
        "MB/s": round(megabytes / statistics.median(each.seconds for each in costs), 2),
        "peak MB": round(statistics.median(each.peak_bytes for each in costs) / 1e6),
    }


def _bars(costs: dict[str, list[Cost]], written: Written) -> list[Bar]:
    seconds = {name: statistics.median(each.cpu_seconds for each in found) for name, found in costs.items()}
    peaks = {name: statistics.median(each.peak_bytes for each in found) for name, found in costs.items()}
    best = min(DATATROVE, key=seconds.__getitem__)
    targets = {best: 4.0, DOLMA: 6.0, MEGATRON: 5.0}
    return [
        *(
            Bar(f"times as fast as {name}", seconds.get(name, 0) / seconds[PREP], least)
            for name, least in targets.items()
        ),
        Bar(f"tokenizers alone, times as fast as {best}", seconds[best] / seconds[ALONE], 1.3),
        Bar(f"memory of {best}, times ours", peaks[best] / peaks[PREP], 2),
        Bar("2.02 bytes, over those of a token", 2.02 * written.tokens / written.bytes, 1),
    ]


def scaling(folder: Path, texts: Sequence[str], rounds: int) -> Result:
    """CPU seconds by size, with two workers, and wall seconds with one and with two."""
    for size in SIZES:
        if write_text(folder / str(size), texts, size) < 0.99 * size:
            raise InputError(f"--input: less than {size} MB of text; python -m benchmarks.corpus fetches more")
        shutil.copy(folder / TOKENIZER, folder / str(size))
    costs: dict[tuple[int, int], list[Cost]] = {
        (size, workers): [] for size, workers in (*((size, 2) for size in SIZES), (SIZES[-1], 1))
    }
    for _ in range(rounds):
        for (size, workers), found in costs.items():
            found.append(cost(prep(folder / str(size), _gone(folder / "shards"), workers)))
    rows = [
        _row(f"{size} MB, {workers} worker{'s' * (workers > 1)}", size, found)
        for (size, workers), found in costs.items()
    ]
    cpu = np.array([statistics.median(each.cpu_seconds for each in costs[size, 2]) for size in SIZES])
    line = np.polyval(np.polyfit(SIZES, cpu, 1), SIZES)
    wall = [statistics.median(each.seconds for each in costs[SIZES[-1], workers]) for workers in (1, 2)]
    return Result(
        rows,
        [
            Bar("1, less the largest distance from a line", 1 - float(np.max(np.abs(cpu / line - 1))), 0.9),
            Bar("two workers, times as fast as one", wall[0] / wall[1], 1.6),
        ],
    )


def cost(command: Sequence[str]) -> Cost:
    """Runs a command. Raises RuntimeError, with the end of what it wrote, if it fails."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        with psutil.Popen(command, stdout=output, stderr=output) as process:
            while process.poll() is None:
                peak = max(peak, _memory(process))
                time.sleep(MEMORY_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {output.read().decode(errors='replace')[-2000:]}")
    with contextlib.suppress(ChildProcessError):
        while True:  # those that it left to us, so that they count
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, peak)


def _memory(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):  # it has just ended
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().pss
    return total


def inspect(contender: Contender, output: Path) -> Written:
    """What a contender wrote."""
    digest = tokens = 0
    for ids in contender.documents(output):
        digest = (digest + xxhash.xxh3_64_intdigest(ids.tobytes())) % 2**64
        tokens += len(ids)
    sizes = [path.stat().st_size for pattern in contender.stored for path in output.glob(pattern)]
    return Written(digest, tokens, sum(sizes))


def _gone(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


if __name__ == "__main__":
    sys.exit(
        main(
            "Text to tokens on disk",
            measure,
            input="",
            megabytes=200,
            vocab_size=32_000,
            peers="build/peers",
            rounds=5,
            scaling=False,
        )
    )
