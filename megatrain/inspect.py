"""`megatrain inspect path=PATH`: what a checkpoint or a shard set holds, and whether it is whole; what samples are of.

Design choices:
- Everything is read and every hash is checked, once; the exit code says the result: 0 whole, 1 not whole.
- In a run directory a folder without a commit record is what a death in mid-save leaves: it is shown, and it doesn't
  make the run directory broken, since nothing reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash
from omegaconf import OmegaConf
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from megatrain import storage
from megatrain.checkpoint.folders import CHECKPOINTS, F, read_state, resolve, scan
from megatrain.checkpoint.format import COMMIT
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.command_config import InspectConfig
from megatrain.data.cache import Cache
from megatrain.data.documents import Extract, extracts
from megatrain.data.format import (
    HELD_OUT,
    MANIFEST,
    TRAIN,
    ShardSet,
    index_name,
    metadata_path,
    open_set,
    parse_manifest,
)
from megatrain.data.remote import open_remote
from megatrain.data.samples import SampleOrder, Source, open_sources
from megatrain.data.state import State, start_state
from megatrain.data_config import DataConfig, Packing
from megatrain.errors import BUG, DONE, GaveUp, InputError, MegatrainError, bad_value
from megatrain.storage import Folder, listing

Row = tuple[str, str]
SEQUENCE_LENGTH, SEED = 2048, 0
"""Of a set's order, where none is given."""


def run(config: InspectConfig) -> int:
    """Prints a table; 0: all that is committed is whole, 1: it isn't. Raises InputError where there is nothing."""
    if config.sample is not None or config.order is not None:
        return _show_order(config)
    if storage.URL.match(config.path):
        whole = _show_path(storage.root(config.path, "path"), config)
    else:
        whole = _show_path(Path(config.path), config)
    return DONE if whole else BUG


def _show_path(path: F, config: InspectConfig) -> bool:
    """Whatever is there. Raises InputError where nothing is."""
    if CHECKPOINTS in listing(path) or COMMIT in listing(path) or path.name.startswith("step_"):
        return _show_checkpoints(path)
    verdicts = [_show(str(folder), _split_rows(folder, split, config)) for folder, split in _splits(path)]
    if not verdicts:
        raise bad_value("path", config.path, "give a shard set, a run directory or the folder of a step")
    return all(verdicts)


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


def _splits(path: Folder) -> list[tuple[Folder, str]]:
    """The splits of a set, or the one that `path` is, each with its name. Raises InputError, StorageError."""
    found: list[tuple[Folder, str]] = []
    for folder in (path, path / TRAIN, path / HELD_OUT):
        manifest = folder / MANIFEST
        with suppress(FileNotFoundError):
            with storage.one_line(manifest):
                data = manifest.read_bytes()
            found.append((folder, parse_manifest(data, str(manifest)).split))
    return found


def _split_rows(folder: Folder, split: str, config: InspectConfig) -> Iterator[Row]:
    data = _data_of(config, folder)
    if isinstance(folder, Path):
        opened = open_set(folder, split)
    else:
        opened = open_remote(str(folder), split, "path", data.remote, Cache(data.cache), allow_damage=False)
    manifest = opened.manifest
    yield "split", manifest.split
    yield "tokens", f"{manifest.tokens:,} of {manifest.id_dtype}"
    yield "documents", f"{manifest.documents:,}"
    yield "vocabulary", f"{manifest.vocab_size:,}, end of document {manifest.eos_id}"
    yield "tokenizer sha256", manifest.tokenizer_sha256
    yield "shards", f"{len(manifest.shards):,}, {decimal(sum(shard.bytes for shard in manifest.shards))}"
    yield "manifest sha256", manifest.sha256
    _verify_split(opened)
    if config.sequence_length is not None:
        (source,) = open_sources(data, _sequence_length(config), split)
        name = f"samples of {config.sequence_length:,}, {source.index.packing.value}"
        yield name, f"{source.index.samples:,}, {source.index.padding_share:.2%} of their positions are padding"


def _verify_split(opened: ShardSet) -> None:
    """Hashes every file of a split. Raises GaveUp naming the first that is altered."""
    folder = opened.folder if opened.tars is None else storage.root(str(opened.tars), "path")
    for shard in opened.manifest.shards:
        tar = folder / shard.name
        digests = {
            tar: shard.xxh3_128,
            tar.with_name(index_name(shard.name)): shard.index_xxh3_128,
            tar.with_name(metadata_path(Path(shard.name)).name): shard.metadata_xxh3_128,
        }
        for path, digest in digests.items():
            found = xxhash.xxh3_128()
            with storage.one_line(path), path.open("rb") as file:
                while data := file.read(storage.REMOTE_CALL_BYTES):
                    found.update(data)
            if found.hexdigest() != digest:
                raise GaveUp(f"{path}: altered since the manifest was written (xxh3-128 differs)")


def _show_order(config: InspectConfig) -> int:
    """Prints which documents samples are of, and the text of one. Raises InputError."""
    if config.sample is not None and config.order is not None:
        raise bad_value("order", config.order, "and sample= are two questions; give one of them")
    first, last = _samples(config)
    data, seed, state = _trained_on(config)
    opened: dict[tuple[int, str], list[Source]] = {}
    table = Table("n", "source", "sample", "places", "document", "shard", "member")
    for n in range(first, last):
        order = _order_of(n, data, seed, state, opened, "sample" if config.order is None else "order")
        for source, number, found in _documents(order, n):
            tokens = f"tokens {found.first} to {found.first + found.stop - found.start - 1} of {found.tokens}"
            document = "\n".join(filter(None, (found.id, found.url, tokens)))
            places = f"{found.start} to {found.stop - 1}"
            cells = (n, source.name, number, places, document, Path(found.shard).stem, found.member)
            table.add_row(*(Text(str(cell), overflow="fold") for cell in cells))
    Console(highlight=False, markup=False).print(table)
    if config.sample is not None:
        _show_text(order, config.sample)
    return DONE


def _samples(config: InspectConfig) -> tuple[int, int]:
    """The samples asked for, first and one more than the last."""
    if config.sample is not None:
        if config.sample < 0:
            raise bad_value("sample", config.sample, "legal: 0 or more")
        return config.sample, config.sample + 1
    match = re.fullmatch(r"(\d+):(\d+)", config.order or "")
    if match is None or int(match[1]) >= int(match[2]):
        raise bad_value("order", config.order, "legal: FIRST:LAST with FIRST below LAST, such as 1000:1010")
    return int(match[1]), int(match[2])


def _trained_on(config: InspectConfig) -> tuple[DataConfig, int, State]:
    """The data, the seed and the segments of a run or, of a run that would begin, on a set."""
    path = config.path
    folder = storage.root(path, "path") if storage.URL.match(path) else Path(path)
    if not {CHECKPOINTS, COMMIT} & set(listing(folder)):
        data = _data_of(config, path)
        seed = SEED if config.seed is None else config.seed
        return data, seed, start_state(open_sources(data, _sequence_length(config)), seed, global_batch_size=1)
    for key in ("sequence_length", "packing", "seed"):
        if (given := getattr(config, key)) is not None:
            raise bad_value(key, given, "is for a shard set; a run has its own")
    saved = read_state(resolve(path, "path"))
    written: dict[str, Any] = saved["config"].get("data", {})
    if not saved["data"]:
        raise bad_value("path", path, "holds weights that were trained on nothing here")
    known = {key: value for key, value in written.items() if key in DataConfig.__dataclass_fields__}
    data = cast(DataConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), known)))
    data = replace(data, index_path=config.index_path or data.index_path)
    return data, saved["config"]["seed"], cast(State, saved["data"])


def _data_of(config: InspectConfig, path: Folder | str) -> DataConfig:
    """A set alone, as it is asked for."""
    return DataConfig(path=str(path), packing=config.packing or Packing.concat, index_path=config.index_path)


def _sequence_length(config: InspectConfig) -> int:
    """Of a set's samples. Raises InputError."""
    length = SEQUENCE_LENGTH if config.sequence_length is None else config.sequence_length
    if length < 1:
        raise bad_value("sequence_length", length, "legal: 1 or more")
    return length


def _order_of(
    n: int, data: DataConfig, seed: int, state: State, opened: dict[tuple[int, str], list[Source]], key: str
) -> SampleOrder:
    """The order that sample n is of: its segment's. opened: sources by length and packing, filled on the way.

    Raises InputError, naming `key`, if no step was or will be trained on it, or naming a set that isn't there any more.
    """
    segments = state["segments"]
    segment = [each for each in segments if each["from_sample"] <= n or each is segments[0]][-1]
    for each in segments:
        if each["passed_over"] is not None and each["passed_over"][0] <= n <= each["passed_over"][1]:
            raise bad_value(key, n, f"samples {each['passed_over'][0]} to {each['passed_over'][1]} were passed over")
    cut = segment["sequence_length"], segment["packing"]
    if cut not in opened:
        opened[cut] = open_sources(replace(data, packing=Packing(segment["packing"])), segment["sequence_length"])
    for name, part in segment["mixture"].items():
        now = next((source.manifest.sha256 for source in opened[cut] if source.name == name), "absent")
        if now != part["manifest_sha256"]:
            raise InputError(f"data.sources.{name}: sample {n} was of another set (manifest_sha256 differs)")
    order = SampleOrder([source for source in opened[cut] if source.name in segment["mixture"]], seed, segment)
    if order.total_samples is not None and n >= order.total_samples:
        raise bad_value(key, n, f"the data end after sample {order.total_samples - 1}")
    return order


def _documents(order: SampleOrder, n: int) -> Iterator[tuple[Source, int, Extract]]:
    """What sample n has of each document: its source, the sample's number in it, and where."""
    (number,), (sample,) = (found.tolist() for found in order.locate(np.array([n])))
    source = order.sources[number]
    for found in extracts(source, sample):
        yield source, sample, found


def _show_text(order: SampleOrder, n: int) -> None:
    """Prints the text of sample n, document by document, as its tokenizer decodes it."""
    from tokenizers import Tokenizer

    console = Console(soft_wrap=True, highlight=False, markup=False)
    raw = order.read(np.array([n]))
    ids = raw.ids[0].tolist()
    for source, _, found in _documents(order, n):
        tokenizer = Tokenizer.from_file(str(source.tokenizer))
        console.rule(f"places {found.start} to {found.stop - 1}: {found.id or 'document'}", align="left")
        console.print(tokenizer.decode(ids[found.start : found.stop], skip_special_tokens=False))
    length = int(raw.length[0])
    if length < len(ids):
        console.rule(f"places {length} to {len(ids) - 1}: padding", align="left")
