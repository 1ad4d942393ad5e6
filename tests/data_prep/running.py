"""`megatrain prep` on a small input: texts, what was written, and an executor that starts no process."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash
from tokenizers import Tokenizer

from megatrain.data.format import member_arrays, open_set
from megatrain.data_prep.config import PrepConfig

PROSE = (
    "Every document of a corpus is read once, split into tokens, and laid beside the others in a shard; whoever trains "
    "on it later never meets the text again, only numbers. So the numbers have to be right: naïve café 中文 заметка, "
    "tabs\tand\nlines, 1234567 digits, don't and DON'T, {'code': [1, 2, 3]}, https://example.org/path?query=1#part, "
    "spaces   in   rows, emoji 👩‍🚀, and a last sentence which makes the list long enough to be cut anywhere."
)
WORDS = PROSE.split(" ")


def text(number: int) -> str:
    return f"document {number}: " + " ".join(WORDS[number % 40 :] + WORDS * (number % 7))


def in_this_process(function: Callable[[Any], Any], tasks: Sequence[Any], *_: object) -> Iterator[tuple[int, Any]]:
    """In place of an executor."""
    for number, task in enumerate(tasks):
        yield number, function(task)


def write_jsonl(config: PrepConfig, name: str, *texts: object) -> None:
    (Path(config.input or "") / name).write_text("".join(json.dumps({"text": value}) + "\n" for value in texts))


def documents(config: PrepConfig, split: str) -> list[tuple[str, dict[str, Any]]]:
    """The decoded texts of a split and their metadata, with every hash checked and EOS taken off."""
    opened = open_set(config.output, split)
    decoder = Tokenizer.from_file(str(opened.tokenizer))
    found = []
    for shard, entry in enumerate(opened.manifest.shards):
        data = opened.path(shard).read_bytes()
        metadata = opened.path(shard).with_suffix(".parquet")
        assert xxhash.xxh3_128_hexdigest(data) == entry.xxh3_128
        assert xxhash.xxh3_128_hexdigest(metadata.read_bytes()) == entry.metadata_xxh3_128
        rows = iter(pq.read_table(metadata).to_pylist())
        for member in opened.members(shard):
            ids, lengths = member_arrays(data, member, opened.id_dtype)
            for part in np.split(ids, np.cumsum(lengths))[:-1]:
                assert part[-1] == opened.manifest.eos_id
                found.append((decoder.decode(part[:-1].tolist(), skip_special_tokens=False), next(rows)))
        assert next(rows, None) is None
    assert len(found) == opened.manifest.documents
    return found


def report(config: PrepConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.output) / "report.json").read_bytes())
    return found


def files(config: PrepConfig) -> dict[str, bytes]:
    """What was written, but for the report, which holds times."""
    folder = Path(config.output)
    paths = (path for path in folder.rglob("*") if path.is_file() and path.stem != "report")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes, as a quota or a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
