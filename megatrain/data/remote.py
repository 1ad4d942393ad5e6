"""Sets in a remote store: data.path=s3://..., gs://..., https://... No torch.

Design choices:
- What is small, the manifest, the tokenizer and the indexes, is copied into the cache's folder and opened there like
  any local set, under the sha256 of the manifest, which is asked for anew by each start. The tars stay where they are.
- A member is fetched whole, by ranged reads of its shard: it is what has a hash, so nothing unverified is ever cached
  or trained on. The members of a step are fetched many at a time; which is there first doesn't matter.
- Only bytes that did arrive make a member bad, and only after all attempts: what the network did is never taken for
  what the file holds, so that every rank says the same of a member.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatrain.data.cache import Cache
from megatrain.data.format import (
    LENGTH_DTYPE,
    MANIFEST,
    Manifest,
    ShardSet,
    damaged_shards,
    index_path,
    member_digest,
    parse_manifest,
)
from megatrain.data.reader import ALTERED, CUT_OFF, BadMember, Payloads, bad_member
from megatrain.data.remote_folder import REQUESTS, RemoteFolder
from megatrain.data.sequences import Members
from megatrain.data_config import RemoteConfig
from megatrain.errors import GaveUp, InputError
from megatrain.resilience.files import temporary_beside
from megatrain.storage import StorageError, root

OPEN_MEMBERS = 256
"""Members that one reader keeps mapped; each holds a file open."""


def open_remote(url: str, split: str, key: str, limits: RemoteConfig, cache: Cache, allow_damage: bool) -> ShardSet:
    """Opens the split of a set in a store, and checks that it is there, like format.open_set.

    url: of the folder that `megatrain prep` wrote, or of the split itself. key: the one that the URL was given for.
    Raises InputError like open_set; StorageError where the store doesn't answer; GaveUp if an index was altered.
    """
    base = RemoteFolder(root(url, key), limits)
    try:
        remote, above = base / split, base
        data = remote.read(MANIFEST)
    except FileNotFoundError:
        remote, above = base, RemoteFolder(base.folder.parent, limits)
        try:
            data = remote.read(MANIFEST)
        except FileNotFoundError:
            raise InputError(f"{url}: no {split}/{MANIFEST} in it; give what `megatrain prep` finished") from None
    manifest = parse_manifest(data, f"{remote}/{MANIFEST}")
    if manifest.split != split:
        raise InputError(f"{remote}: holds the split {manifest.split}, and {split} was asked for")
    sizes = remote.sizes(shard.name for shard in manifest.shards)
    folder = cache.sets / manifest.sha256 / split
    with cache.alone(manifest.sha256):
        _copy_set(remote, above, manifest, folder)
    return ShardSet(folder, manifest, remote, damaged_shards(manifest, str(remote), sizes, allow_damage))


def _copy_set(remote: RemoteFolder, above: RemoteFolder, manifest: Manifest, folder: Path) -> None:
    """Copies tokenizer and indexes, where they aren't in `folder` yet with the hashes that the manifest says."""

    def copy(source: RemoteFolder, name: str, target: Path, whole: Callable[[bytes], bool]) -> None:
        if target.is_file() and whole(target.read_bytes()):
            return
        try:
            data = source.read(name)
        except FileNotFoundError:
            raise InputError(f"{source}/{name}: missing, and the manifest lists it") from None
        if not whole(data):
            raise GaveUp(f"{source}/{name}: not what the manifest was written with (its hash differs)")
        temporary = temporary_beside(target)
        temporary.write_bytes(data)
        temporary.replace(target)

    def index(number: int) -> None:
        shard = manifest.shards[number]
        target = index_path(folder / shard.name)
        copy(remote, target.name, target, lambda data: xxhash.xxh3_128_hexdigest(data) == shard.index_xxh3_128)

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder.parent / manifest.tokenizer
    copy(above, tokenizer.name, tokenizer, lambda data: hashlib.sha256(data).hexdigest() == manifest.tokenizer_sha256)
    with ThreadPoolExecutor(REQUESTS) as threads:
        list(threads.map(index, range(len(manifest.shards))))


class RemoteMembers(Payloads):
    """The payloads of a set's members, fetched and cached."""

    def __init__(self, shards: ShardSet, members: Members, cache: Cache) -> None:
        assert shards.tars is not None  # It is open_remote's.
        self._shards = shards
        self._tars = shards.tars
        self._members = members
        self._cache = cache
        self._bad: dict[int, BadMember] = {}
        self._place = lru_cache(maxsize=OPEN_MEMBERS)(self._open)
        self._threads = ThreadPoolExecutor(REQUESTS, thread_name_prefix="fetch")

    def fetch(self, members: npt.NDArray[np.intp]) -> None:
        """Fetches them, many at a time. A bad one is left to who reads it."""

        def fetched(member: int) -> None:
            with suppress(BadMember):
                self._place(member)

        list(self._threads.map(fetched, members.tolist()))

    def verify(self, member: int) -> None:
        """Nothing is mapped that isn't verified."""
        self._place(member)

    def place(self, member: int) -> tuple[mmap.mmap, int, int]:
        """The member's file in the cache; the second payload begins where the first ends."""
        return self._place(member)

    def _token_bytes(self, member: int) -> int:
        first_token = self._members.first_token
        return int(first_token[member + 1] - first_token[member]) * self._shards.id_dtype.itemsize

    def _open(self, member: int) -> tuple[mmap.mmap, int, int]:
        if member in self._bad:
            raise self._bad[member]
        digest = self._members.digest[member].tobytes().hex()
        mapped = self._cache.get(digest)
        if mapped is None:
            with self._cache.alone(digest):
                mapped = self._cache.get(digest)  # Another rank may have fetched it meanwhile.
                if mapped is None:
                    mapped = self._cache.put(digest, *self._download(member, digest))
        return mapped, 0, self._token_bytes(member)

    def _download(self, member: int, digest: str) -> tuple[memoryview, memoryview]:
        """Both payloads, verified. Raises BadMember, StorageError."""
        m, shard = self._members, int(self._members.shard[member])
        start, second = int(m.tokens_offset[member]), int(m.lengths_offset[member])
        stop = second + int(m.documents[member]) * LENGTH_DTYPE.itemsize
        name = self._shards.manifest.shards[shard].name

        def verified(data: bytes) -> tuple[memoryview, memoryview]:
            view = memoryview(data)
            payloads = view[: self._token_bytes(member)], view[second - start :]
            if member_digest(*payloads) != digest:
                raise bad_member(self._shards, m, member, ALTERED)
            return payloads

        try:
            if stop > self._shards.damaged.get(shard, stop):
                raise bad_member(self._shards, m, member, CUT_OFF)
            return self._tars.read_range(name, start, stop, verified)
        except BadMember as error:
            self._bad[member] = error
            raise
        except FileNotFoundError as error:
            raise StorageError(str(error)) from None
