"""What there is to do: the files of the input, cut into units, and the names of their results.

Design choices:
- A unit's key is a hash of what its results are a function of: names, sizes and times of its files, its place in them,
  and the settings that matter. Results lie in folders named by keys, so a changed file or setting is other work, and
  what didn't change is not done again.
- Inputs are taken in the order in which they are given, their files by name: it decides which of two equal documents
  is the first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatrain import __version__
from megatrain.data.format import LENGTH_DTYPE, Manifest, canonical_json, id_dtype_name, shard_name
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.execute.config import ExecuteConfig
from megatrain.data_prep.read.files import Files, Unit, find_files, plan
from megatrain.data_prep.results import has_split
from megatrain.data_prep.shards.cut import cut
from megatrain.data_prep.shards.write import ShardTask
from megatrain.data_prep.units import FinishTask, Settings, StoredTokenizer, UnitTask

WORK = ".work"
"""What a run has in its output folder until the set is committed."""
WITHOUT_EFFECT = {"output", "append", "unit_bytes", "max_bad_share", *(field.name for field in fields(ExecuteConfig))}
"""Keys that say nothing about the bytes of a set."""


@dataclass(frozen=True)
class Input:
    """The files of one input. source: of documents that don't name theirs. ignored: how many files of a folder were."""

    source: str | None
    files: Files
    ignored: int


def find_inputs(config: PrepConfig) -> list[Input]:
    """The files of all inputs. Raises InputError where an input has none."""
    patterns = [*([(None, config.input)] if config.input else []), *config.inputs.items()]
    found = [(source, *find_files(pattern)) for source, pattern in patterns]
    return [Input(source, files, ignored.total()) for source, files, ignored in found]


def what_matters(config: PrepConfig) -> dict[str, Any]:
    """The configuration without what has no effect on the bytes of a set; JSON."""
    values = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    found: dict[str, Any] = json.loads(json.dumps(values, default=lambda choice: choice.value))
    return found


def without_places(config: PrepConfig) -> dict[str, Any]:
    """What matters, without where the input and the tokenizer were: a set is the same wherever it was made."""
    matters = what_matters(config)
    named = {"input": None, "inputs": list(config.inputs), "tokenizer": matters["tokenizer"] | {"path": None}}
    return matters | named


def plan_units(inputs: list[Input], settings: Settings, folder: Path) -> list[UnitTask]:
    """The units in order. folder: where their results go."""
    config, index = settings.config, settings.evaluation_index
    # Which other files there are is not what a unit depends on.
    matters = what_matters(config) | {"input": None, "inputs": None, "tokenizer": None}
    evaluation = index and Path(index).name
    chosen = {
        "version": __version__,
        "tokenizer": settings.tokenizer.sha256,
        "evaluation": evaluation,
        "config": matters,
    }
    shared = json.dumps(chosen, sort_keys=True)
    tasks = []
    for each in inputs:
        for unit in plan(each.files, config.unit_bytes):
            key = xxhash.xxh3_128_hexdigest(canonical_json([shared, each.source, _what(unit)]))
            tasks.append(UnitTask(key, str(folder / key), unit, each.source))
    return tasks


def plan_finish(
    units: list[UnitTask], duplicates: Path | None, repeated: Path | None, folder: Path
) -> list[FinishTask]:
    """The second task of each unit. duplicates, repeated: what was found among all units; their names say of what."""
    tasks = []
    for number, unit in enumerate(units):
        found = [None if path is None else str(path) for path in (duplicates, repeated)]
        names = [None if path is None else [path.parent.name, path.name] for path in (duplicates, repeated)]
        key = xxhash.xxh3_128_hexdigest(canonical_json([unit.key, number, names]))
        tasks.append(FinishTask(key, str(folder / key), unit, number, *found))
    return tasks


def plan_shards(
    config: PrepConfig,
    units: Sequence[UnitTask | FinishTask],
    tokenizer: StoredTokenizer,
    before: Manifest | None,
    split: str,
) -> list[ShardTask]:
    """The shards of a split, when all units are done. before: the manifest of the set that they are added to."""
    output, id_dtype = Path(config.output), id_dtype_name(tokenizer.vocab_size)
    folders = (unit.folder for unit in units if has_split(Path(unit.folder), split))
    lengths = ((folder, np.memmap(Path(folder) / f"{split}.lengths", LENGTH_DTYPE, "r")) for folder in folders)
    cuts = cut(lengths, np.dtype(id_dtype).itemsize, config.member_bytes, config.shard_bytes)
    tasks = []
    for number, each in enumerate(cuts, len(before.shards) if before else 0):
        path, record = output / split / shard_name(number), output / WORK / f"{split}-{number:06d}.json"
        key = xxhash.xxh3_128_hexdigest(canonical_json([asdict(each), split, number]))
        tasks.append(ShardTask(key, str(path), str(record), split, id_dtype, each.parts, each.members, each.tokens))
    return tasks


def _what(unit: Unit) -> list[list[Any]]:
    return [[getattr(piece, field.name) for field in fields(piece) if field.name != "path"] for piece in unit]
