"""What benchmarks/prep.py compares: programs that read documents, tokenize them and write their ids.

    python -m benchmarks.prep_peers NAME FOLDER OUTPUT        runs one of OWN

Design choices:
- Each is a command of its own, started anew: its memory and its CPU seconds are the whole tool's, start included.
- All read the same documents, from FOLDER/parquet/ or, if they can't, from FOLDER/jsonl/, with FOLDER/tokenizer.json.
- datatrove and dolma run as their documentation says, without the shuffle that datatrove has by default. The
  preprocess of Megatron-LM can't run without its training framework, so its shape is written down here: a pool of two
  that is handed documents, 32 at a time, encodes one by one, and sends the ids to the process that writes them.
- dolma needs an older numpy: it lives in a virtual environment of its own, which `install_dolma` makes.
"""

from __future__ import annotations

import csv
import gzip
import json
import multiprocessing
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data.format import TOKENIZER, TRAIN, member_arrays, open_set
from megatrain.data_prep.tokenizer import EOS

UInt16 = npt.NDArray[np.uint16]
PACKAGES = ("dolma==1.2.1", "numpy<2", "boto3==1.28.17")
"""Its own pins leave pip to try every boto3 there is, so the one that fits is named."""
PROCESSES = 2
AT_ONCE = 32
"""Documents that Megatron-LM hands to a process at once."""
FOR_TOKENIZERS = "for_tokenizers.json"
"""In FOLDER too: the same with a normalizer that does nothing, which is enough to keep tiktoken from it."""
UNIT_BYTES = 4 << 20
"""Of megatrain's units: the text is small, and all workers should have some."""


@dataclass(frozen=True)
class Contender:
    """command: of FOLDER and OUTPUT. documents: of OUTPUT, the ids of each. stored: the files that hold ids."""

    name: str
    command: Callable[[Path, Path], list[str]]
    documents: Callable[[Path], Iterable[UInt16]]
    stored: tuple[str, ...]


def prep(folder: Path, output: Path, workers: int = PROCESSES, tokenizer: str = TOKENIZER) -> list[str]:
    """The command that users type."""
    keys = {
        "input": folder / "parquet",
        "output": output,
        "tokenizer.path": folder / tokenizer,
        "held_out_share": 0,
        "unit_bytes": UNIT_BYTES,
        "workers": workers,
    }
    return [sys.executable, "-m", "megatrain", "prep", *(f"{key}={value}" for key, value in keys.items())]


def own(name: str, folder: Path, output: Path) -> list[str]:
    """One of OWN in a process."""
    return [sys.executable, "-m", "benchmarks.prep_peers", name, str(folder), str(output)]


def dolma(peers: Path, folder: Path, output: Path) -> list[str]:
    """The command of dolma."""
    keys = {
        "documents": folder / "jsonl" / "*.jsonl",
        "destination": output,
        "tokenizer.name_or_path": folder / TOKENIZER,
        "tokenizer.eos_token_id": 0,
        "tokenizer.pad_token_id": 0,
        "dtype": "uint16",
        "processes": PROCESSES,
    }
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [str(peers / "dolma" / "bin" / "dolma"), "tokens", *arguments]


def install_dolma(peers: Path) -> str | None:
    """Makes its virtual environment, unless it is there. Why that can't be done, or None."""
    home = peers / "dolma"
    if not (home / "bin" / "dolma").exists():
        venv.create(home, with_pip=True)
        command = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            return ended.stderr.strip().rpartition("\n")[2]
    return None


def datatrove(tasks: int, folder: Path, output: Path) -> None:
    """Its DocumentTokenizer on its local executor."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        [
            ParquetReader(str(folder / "parquet")),
            DocumentTokenizer(
                str(output / "ids"),
                tokenizer_name_or_path=str(folder / TOKENIZER),
                eos_token=EOS,
                shuffle_documents=False,
            ),
        ],
        tasks=tasks,
        workers=tasks,
        logging_dir=str(output / "logs"),
    ).run()


_tokenizer: Any = None
"""Of a process of Megatron-LM's pool."""


def _start(path: str) -> None:
    from tokenizers import Tokenizer

    global _tokenizer
    _tokenizer = Tokenizer.from_file(path)


def _encode(line: str) -> list[int]:
    return [*_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, _tokenizer.token_to_id(EOS)]


def megatron(folder: Path, output: Path) -> None:
    """The shape of Megatron-LM's tools/preprocess_data.py."""
    output.mkdir()
    lengths = []
    context = multiprocessing.get_context("fork")
    with (
        context.Pool(PROCESSES, _start, (str(folder / TOKENIZER),)) as pool,
        (output / "text.bin").open("wb") as file,
    ):
        for ids in pool.imap(_encode, _lines(folder), AT_ONCE):
            file.write(np.array(ids, np.uint16).tobytes())
            lengths.append(len(ids))
    np.array(lengths, np.int32).tofile(output / "text.idx")


def _lines(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "jsonl").glob("*")):
        with path.open() as file:
            yield from file


def read_prep(output: Path) -> Iterator[UInt16]:
    """The documents of a set."""
    shards = open_set(output, TRAIN)
    for number in range(len(shards.manifest.shards)):
        data = np.memmap(shards.path(number), np.uint8, "r")
        for member in shards.members(number):
            ids, lengths = member_arrays(data, member, shards.id_dtype)
            yield from _cut(ids, np.cumsum(lengths, dtype=np.int64))


def read_datatrove(output: Path) -> Iterator[UInt16]:
    """The documents of its .ds files, whose index holds where each ends."""
    for path in sorted(output.glob("ids/*.ds")):
        yield from _cut(np.memmap(path, np.uint16, "r"), np.fromfile(f"{path}.index", np.uint64).astype(np.int64))


def read_megatron(output: Path) -> Iterator[UInt16]:
    """The documents of the flat file."""
    lengths = np.fromfile(output / "text.idx", np.int32)
    yield from _cut(np.memmap(output / "text.bin", np.uint16, "r"), np.cumsum(lengths, dtype=np.int64))


def read_dolma(output: Path) -> Iterator[UInt16]:
    """The documents of its flat files, which a table says the places of."""
    for path in sorted(output.glob("*.npy")):
        ids = np.memmap(path, np.uint16, "r")
        with gzip.open(path.with_suffix(".csv.gz"), "rt") as file:
            for start, end, *_ in csv.reader(file):
                yield ids[int(start) : int(end)]


def _cut(ids: UInt16, ends: npt.NDArray[np.int64]) -> Iterator[UInt16]:
    start = 0
    for end in ends.tolist():
        yield ids[start:end]
        start = end


PREP = "megatrain prep, 2 workers"
ALONE = "megatrain prep, tokenizers alone"
DATATROVE = ("datatrove, 1 task", "datatrove, 2 tasks")
MEGATRON = "Megatron-LM's shape, 2 processes"
DOLMA = "dolma tokens, 2 processes"
OWN: dict[str, Callable[[Path, Path], None]] = {
    DATATROVE[0]: partial(datatrove, 1),
    DATATROVE[1]: partial(datatrove, 2),
    MEGATRON: megatron,
}


def contenders(peers: Path) -> list[Contender]:
    """All of them; dolma from where `install_dolma` puts it."""
    tars = ("train/*.tar", "train/*.json")
    return [
        Contender(PREP, prep, read_prep, tars),
        Contender(ALONE, partial(prep, tokenizer=FOR_TOKENIZERS), read_prep, tars),
        *(Contender(name, partial(own, name), read_datatrove, ("ids/*.ds", "ids/*.index")) for name in DATATROVE),
        Contender(MEGATRON, partial(own, MEGATRON), read_megatron, ("text.*",)),
        Contender(DOLMA, partial(dolma, peers), read_dolma, ("*.npy", "*.csv.gz")),
    ]


if __name__ == "__main__":
    OWN[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
