"""What was fetched from remote stores: a bounded folder on a local disk that the ranks of a node share. No torch.

Design choices:
- A member is a file named after its hash, and what it holds is what is hashed: so it can be checked with nothing else
  at hand, sets and runs share it, and who fetches it first doesn't matter. A file that isn't what its name says is
  dropped, and fetched again; so nothing needs to be synced.
- Files appear by a rename and are never written again, and who has mapped one keeps it after its removal. So readers
  and evictions need no lock; a lock only keeps the ranks of a node from fetching the same member at once.
- The oldest go first, by modification time, which a reader sets when it opens one. Looking for them means listing the
  folder: each process does so once it has added a 64th of the limit, and leaves an eighth free, room for eight of them.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from megatrain.data_config import CacheConfig
from megatrain.errors import GaveUp, bad_value
from megatrain.resilience.files import temporary_beside

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

LEGAL = "legal: a folder on a local disk, with room"
ABANDONED_SECONDS = 3600.0
"""A temporary file this old is one whose process died."""


class Cache:
    """The folder of a configuration: `sets` for what is small and stays, members up to `limit` bytes.

    Raises InputError naming data.cache.path if it can't be written, or the default one is someone else's.
    """

    def __init__(self, config: CacheConfig) -> None:
        default = Path(tempfile.gettempdir(), f"megatrain-{os.getuid()}")
        self.folder = default if config.path is None else Path(config.path)
        self.limit = config.bytes
        self.sets, self._members, self._locks = (self.folder / name for name in ("sets", "members", "locks"))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.sets, self._members, self._locks):
                folder.mkdir(exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise bad_value("data.cache.path", self.folder, f"{error.strerror}; {LEGAL}") from None
        if config.path is None and owner != os.getuid():
            raise bad_value("data.cache.path", self.folder, f"it is another user's; {LEGAL}")
        self._added = self.limit  # So the first one added looks at what earlier runs left.

    def get(self, digest: str) -> mmap.mmap | None:
        """The member with this xxh3-128, mapped and verified; None: it isn't there."""
        path = self._members / digest
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except ValueError:  # An empty file can't be mapped.
            mapped = None
        except OSError as error:
            raise self._refusal(error) from None
        if mapped is None or xxhash.xxh3_128_hexdigest(mapped) != digest:
            log.warning("%s: damaged, and dropped from the cache", path)
            path.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):
            os.utime(path)
        return mapped

    def put(self, digest: str, *parts: Buffer) -> mmap.mmap:
        """Adds a member, whose `parts` one after the other have this xxh3-128. Returns it mapped."""
        path = self._members / digest
        temporary = temporary_beside(path)
        try:
            with temporary.open("w+b") as file:
                file.writelines(parts)
                file.flush()
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            temporary.replace(path)
            self._added += len(mapped)
            if self._added >= self.limit // 64:
                self._evict()
                self._added = 0
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._refusal(error) from None
        return mapped

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """One process or thread of the node at a time. name: a hash; a few hundred locks are shared by all of them."""
        try:
            file = (self._locks / name[:2]).open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise self._refusal(error) from None
        with file:
            yield

    def _evict(self) -> None:
        """Removes the oldest members beyond seven eighths of the limit, and what dead processes left."""
        found: list[tuple[float, int, str]] = []
        abandoned = time.time() - ABANDONED_SECONDS
        with os.scandir(self._members) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    if not entry.name.startswith("."):
                        found.append((stat.st_mtime, stat.st_size, entry.path))
                    elif stat.st_mtime < abandoned:
                        Path(entry.path).unlink()
        excess = sum(size for _, size, _ in found) - self.limit * 7 // 8
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size

    def _refusal(self, error: OSError) -> GaveUp:
        return GaveUp(f"data.cache.path={self.folder}: {error.strerror}; {LEGAL}")
