"""Small shard sets for tests of the data path, written by the real writer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatrain.data.format import (
    TOKENIZER,
    TRAIN,
    Manifest,
    ShardList,
    ShardSet,
    id_dtype_name,
    index_path,
    member_arrays,
    open_set,
    shard_name,
)
from megatrain.data.order import Int64
from megatrain.data_prep.shards.manifest import write_manifest
from megatrain.data_prep.shards.writer import ShardWriter

EOS = 0
Shards = Sequence[Sequence[Sequence[int]]]
"""Shards of members of documents, a document given by its count of tokens, EOS included."""


def write_set(
    folder: Path, shards: Shards, split: str = TRAIN, vocab_size: int = 100_000, tokenizer: bytes = b"{}"
) -> ShardSet:
    """Writes documents whose ids count on through the whole set, each with its EOS at the end, and opens the split."""
    (folder / split).mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(tokenizer)
    dtype = np.dtype(id_dtype_name(vocab_size))
    tokens, entries = 0, []
    for number, members in enumerate(shards):
        writer = ShardWriter(folder / split / shard_name(number))
        for lengths in members:
            ids = (1 + np.arange(tokens, tokens + sum(lengths)) % (vocab_size - 1)).astype(dtype)
            ids[np.cumsum(lengths) - 1] = EOS
            writer.add(ids, np.array(lengths, np.uint32))
            tokens += len(ids)
        entries.append(writer.commit(None, None, "0" * 32))
    manifest = Manifest(
        split=split,
        id_dtype=dtype.name,
        vocab_size=vocab_size,
        eos_id=EOS,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        tokens=tokens,
        documents=sum(entry.documents for entry in entries),
        shards=ShardList.of(entries),
    )
    write_manifest(folder / split, manifest)
    return open_set(folder, split)


def write_linked_set(folder: Path, shards: int, members: Sequence[Sequence[int]]) -> ShardSet:
    """Like write_set, of so many shards that are all the same one: links to its tar and index. Not opened."""
    first = write_set(folder, [members])
    entry = first.manifest.shards[0]
    for number in range(1, shards):
        for path in (first.path(0), index_path(first.path(0))):
            (folder / TRAIN / shard_name(number)).with_suffix(path.suffix).symlink_to(path.name)
    manifest = replace(
        first.manifest,
        tokens=entry.tokens * shards,
        documents=entry.documents * shards,
        shards=ShardList.of(replace(entry, name=shard_name(number)) for number in range(shards)),
    )
    write_manifest(folder / TRAIN, manifest)
    return ShardSet(folder / TRAIN, manifest)


def row(shards: ShardSet) -> tuple[Int64, Int64]:
    """All ids of a set, member after member, and for each where in that row its document begins."""
    ids, lengths = [], []
    for number in range(len(shards.manifest.shards)):
        data = shards.path(number).read_bytes()
        for member in shards.members(number):
            ids.append(np.frombuffer(data, shards.id_dtype, member.tokens, member.tokens_offset))
            lengths.append(np.frombuffer(data, "<u4", member.documents, member.lengths_offset))
    length = np.concatenate(lengths).astype(np.int64)
    return np.concatenate(ids).astype(np.int64), np.repeat(np.cumsum(length) - length, length)


def documents(shards: ShardSet, count: int | None = None) -> list[list[list[list[int]]]]:
    """The ids of each document of each member of each shard, or of the first `count` shards."""
    found = []
    for number in range(len(shards.manifest.shards) if count is None else count):
        data = shards.path(number).read_bytes()
        arrays = [member_arrays(data, member, shards.id_dtype) for member in shards.members(number)]
        found.append([[part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] for ids, lengths in arrays])
    return found


def flip_a_bit(shards: ShardSet, shard: int, member: int) -> None:
    """Alters one stored id, leaving the size of the tar as it is."""
    path = shards.path(shard)
    data = bytearray(path.read_bytes())
    data[shards.members(shard)[member].tokens_offset] ^= 1
    path.write_bytes(data)
