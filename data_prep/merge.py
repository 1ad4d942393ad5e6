"""`megatrain merge`: one set of several finished ones, of links to their shards.

Design choices:
- Nothing is read, hashed or written anew but the manifests: shards are hard links with new numbers, and copies where
  the file system can't link. Deleting one of the sets later takes nothing from the merged one.
- Sets are taken in the order in which they are given. All need one tokenizer; no documents are compared.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from megatrain.data.format import (
    TOKENIZER,
    TRAIN,
    Manifest,
    ShardEntry,
    ShardList,
    index_path,
    metadata_path,
    open_set,
    shard_name,
)
from megatrain.data_prep.merge_config import MergeConfig
from megatrain.data_prep.shards.manifest import (
    added_counts,
    read_lineage,
    read_manifests,
    write_lineage,
    write_manifest,
)
from megatrain.data_prep.units import SPLITS
from megatrain.errors import DONE, InputError, bad_value


def run(config: MergeConfig) -> int:
    """Makes the set. Raises InputError, naming the key, where it can't be made."""
    output, folders = Path(config.output), [Path(name) for name in config.sets]
    if len(folders) < 2:
        raise bad_value("sets", config.sets, "give two or more folders")
    if output.exists():
        raise bad_value("output", output, "is there already; give a new folder")
    found = [_opened(folder, folders[0]) for folder in folders]
    new = output.with_name(f".{output.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _place(folders[0] / TOKENIZER, new / TOKENIZER)
    lineage = write_lineage(new, [each for folder in folders for each in read_lineage(folder)])
    for split in reversed(SPLITS):  # the train split's last
        parts = [
            (folder / split, manifests[split])
            for folder, manifests in zip(folders, found, strict=True)
            if split in manifests
        ]
        if parts:
            (new / split).mkdir()
            write_manifest(new / split, _joined(parts, new / split, lineage))
    new.rename(output)
    print(f"{output}: {sum(manifests[TRAIN].tokens for manifests in found):,} tokens to train on, of {len(found)} sets")
    return DONE


def _opened(folder: Path, first: Path) -> dict[str, Manifest]:
    """The manifests of a set whose files are there and that has the tokenizer of the first."""
    manifests = read_manifests(folder)
    if TRAIN not in manifests:
        raise bad_value("sets", folder, "holds no finished set")
    for split in manifests:
        open_set(folder, split)
    if manifests[TRAIN].tokenizer_sha256 != read_manifests(first)[TRAIN].tokenizer_sha256:
        raise bad_value("sets", folder, f"has another tokenizer than {first}")
    return manifests


def _joined(parts: list[tuple[Path, Manifest]], output: Path, lineage_sha256: str) -> Manifest:
    """The manifest of a split, its shards being placed in `output`."""
    entries: list[ShardEntry] = []
    for folder, manifest in parts:
        for entry in manifest.shards:
            name = shard_name(len(entries))
            for place in (Path, index_path, metadata_path):
                _place(place(folder / entry.name), place(output / name))
            entries.append(replace(entry, name=name))
    manifests = [manifest for _, manifest in parts]
    return replace(
        manifests[0],
        tokens=sum(manifest.tokens for manifest in manifests),
        documents=sum(manifest.documents for manifest in manifests),
        shards=ShardList.of(entries),
        counts=added_counts(row for manifest in manifests for row in manifest.counts),
        ids_compared=sum(manifest.ids_compared for manifest in manifests),
        ids_different=sum(manifest.ids_different for manifest in manifests),
        lineage_sha256=lineage_sha256,
    )


def _place(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:
        try:
            shutil.copyfile(file, link)
        except OSError as error:
            raise InputError(f"{error.filename}: can't be linked or copied: {error.strerror}") from None
