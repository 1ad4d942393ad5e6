"""`megatrain inspect path=PATH`: what a checkpoint or a shard set holds, and whether it is whole.

Design choices:
- Everything is read and every hash is checked, once; the exit code says the result: 0 whole, 1 not whole.
- In a run directory a folder without a commit record is what a death in mid-save leaves: it is shown, and it doesn't
  make the run directory broken, since nothing reads it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import xxhash
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from megatrain import storage
from megatrain.checkpoint.folders import CHECKPOINTS, F, scan
from megatrain.checkpoint.format import COMMIT
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.command_config import InspectConfig
from megatrain.data.format import (
    HELD_OUT,
    MANIFEST,
    TRAIN,
    ShardSet,
    index_path,
    metadata_path,
    open_set,
    read_manifest,
)
from megatrain.errors import BUG, DONE, GaveUp, MegatrainError, bad_value
from megatrain.storage import Folder, listing

Row = tuple[str, str]


def run(config: InspectConfig) -> int:
    """Prints a table; 0: all that is committed is whole, 1: it isn't. Raises InputError where there is nothing."""
    if storage.URL.match(config.path):
        return DONE if _show_checkpoints(storage.root(config.path, "path")) else BUG
    path = Path(config.path)
    if CHECKPOINTS in listing(path) or COMMIT in listing(path) or path.name.startswith("step_"):
        whole = _show_checkpoints(path)
    elif splits := [folder for folder in (path, path / TRAIN, path / HELD_OUT) if (folder / MANIFEST).is_file()]:
        verdicts = [_show(str(folder), _split_rows(folder)) for folder in splits]
        whole = all(verdicts)
    else:
        raise bad_value("path", config.path, "give a shard set, a run directory or the folder of a step")
    return DONE if whole else BUG


def _show_checkpoints(path: F) -> bool:
    """One checkpoint, or all of a run, newest first."""
    return _show_run(path) if CHECKPOINTS in listing(path) else _show(str(path), _checkpoint_rows(path))


def _show_run(run_dir: F) -> bool:
    whole = []
    for found in scan(run_dir):
        if COMMIT in listing(found.path):
            whole.append(_show(str(found.path), _checkpoint_rows(found.path)))
        else:
            Console().print(f"{found.problem}; nothing reads it", soft_wrap=True, highlight=False)
    if not whole:
        raise bad_value("path", str(run_dir), "the run directory holds no committed checkpoint")
    return all(whole)


def _show(title: str, rows: Iterator[Row]) -> bool:
    """Prints the rows and the verdict, which is what reading them raised."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("what", Column("value", overflow="fold"), show_header=False)
    problem = None
    try:
        for name, value in rows:
            table.add_row(Text(name), Text(value))
    except (MegatrainError, OSError) as error:
        problem = str(error)
    table.add_row("whole", Text("yes") if problem is None else Text("no", style="red"))
    console.print(title)
    console.print(table, soft_wrap=False)
    if problem is not None:
        console.print(f"not whole: {problem}", style="red")
    return problem is None


def _checkpoint_rows(folder: Folder) -> Iterator[Row]:
    reader = CheckpointReader(folder)
    state = reader.state
    yield "step", str(reader.commit["step"])
    yield "optimizer steps", str(state["optimizer_step"])
    yield "samples", f"{state['samples']:,}"
    yield "model", str(state["config"].get("model", {}).get("name", "not recorded"))
    yield "written by ranks", str(reader.commit["world_size"])
    yield "parameters", f"{sum(map(math.prod, reader.shapes.values())):,} in {len(reader.shapes)}"
    kinds: dict[str, int] = {}
    for (name, _), ranges in reader.index.items():
        kind = f"{name} {ranges.dtype}"
        kinds[kind] = kinds.get(kind, 0) + ranges.size
    for kind, elements in sorted(kinds.items()):
        yield kind, f"{elements:,} elements"
    yield "bytes", decimal(sum(record["bytes"] for record in reader.commit["files"].values()))
    reader.verify_all()


def _split_rows(folder: Path) -> Iterator[Row]:
    opened = open_set(folder, read_manifest(folder / MANIFEST).split)
    manifest = opened.manifest
    yield "split", manifest.split
    yield "tokens", f"{manifest.tokens:,} of {manifest.id_dtype}"
    yield "documents", f"{manifest.documents:,}"
    yield "vocabulary", f"{manifest.vocab_size:,}, end of document {manifest.eos_id}"
    yield "tokenizer sha256", manifest.tokenizer_sha256
    yield "shards", f"{len(manifest.shards):,}, {decimal(sum(shard.bytes for shard in manifest.shards))}"
    yield "manifest sha256", manifest.sha256
    _verify_split(opened)


def _verify_split(opened: ShardSet) -> None:
    """Hashes every file of a split. Raises GaveUp naming the first that is altered."""
    for number, shard in enumerate(opened.manifest.shards):
        tar = opened.path(number)
        digests = {
            tar: shard.xxh3_128,
            index_path(tar): shard.index_xxh3_128,
            metadata_path(tar): shard.metadata_xxh3_128,
        }
        for path, digest in digests.items():
            with path.open("rb") as file:
                if hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() != digest:
                    raise GaveUp(f"{path}: altered since the manifest was written (xxh3-128 differs)")
