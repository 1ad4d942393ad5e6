"""Files of a folder in a remote store, read with a time limit on each request and so many attempts. No torch.

Design choices:
- Each request has a time limit of its own and is sent again so many times; then it is one line with file and reason. So
  however a server fails, it is named after (1 + retries) limits and the pauses between them, and nothing hangs.
- What a store's library raises is taken for a passing failure, but for a missing file and a refused access.
- fsspec's coroutines are called with a time limit where a store has them (s3, gs, http), its plain methods otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from megatrain.data_config import RemoteConfig
from megatrain.errors import GaveUp
from megatrain.storage import REMOTE_CALL_BYTES, StorageError, listing_entry, said

if TYPE_CHECKING:
    from upath import UPath

log = logging.getLogger(__name__)
T = TypeVar("T")

REQUESTS = 16
"""Requests of one rank at a time: 64 MB of members."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds before the second attempt, doubled each time up to these."""
WITHOUT_LISTING = ("http", "https")
"""Protocols that don't list a folder with the sizes of its files."""


def longest_wait(limits: RemoteConfig) -> float:
    """Seconds after which a request is given up, whatever the server does."""
    pauses = sum(min(FIRST_PAUSE * 2.0**n, LONGEST_PAUSE) for n in range(limits.retries))
    return (1 + limits.retries) * limits.timeout_seconds + pauses


class RemoteFolder:
    """Reads files of one folder of a store, patiently. May be used on any thread.

    Its methods raise FileNotFoundError where a file is missing, and StorageError, naming file and reason, when all
    attempts failed.
    """

    def __init__(self, folder: UPath, limits: RemoteConfig) -> None:
        self.folder = folder
        self._limits = limits

    def __str__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(self.folder / name, self._limits)

    def read(self, name: str) -> bytes:
        """A whole file, of a few megabytes."""
        return bytes(self.tried(name, partial(self._ask, "cat_file", self._path(name))))

    def read_range(self, name: str, start: int, stop: int, make: Callable[[bytes], T]) -> T:
        """What `make` returns of bytes [start, stop) of a file; it may raise to have them fetched again."""
        return self.tried(name, lambda: make(self._read_once(name, start, stop)))

    def _read_once(self, name: str, start: int, stop: int) -> bytes:
        """In one attempt. Raises whatever the store's library does."""
        parts = []
        for at in range(start, stop, REMOTE_CALL_BYTES):
            end = min(at + REMOTE_CALL_BYTES, stop)
            data: bytes = self._ask("cat_file", self._path(name), start=at, end=end)
            if len(data) != end - at:
                raise EOFError(f"{len(data)} bytes came where {end - at} were asked for")
            parts.append(data)
        return b"".join(parts)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """The sizes in bytes of those of the files that are there; None: the store doesn't say."""
        if self.folder.protocol not in WITHOUT_LISTING:
            infos = self.tried("", partial(self._ask, "ls", self.folder.path, detail=True))
            return dict(map(listing_entry, infos))
        names = list(names)
        with ThreadPoolExecutor(REQUESTS) as threads:
            found = threads.map(lambda name: self.tried(name, partial(self._size, name)), names)
            return {name: size for name, size in zip(names, found, strict=True) if size != -1}

    def tried(self, name: str, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, which is about the file `name`. A GaveUp of its last attempt is raised as it is."""
        where, pause = f"{self.folder}/{name}".rstrip("/"), FIRST_PAUSE
        for attempts in range(1, self._limits.retries + 2):
            try:
                return attempt()
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where}: missing ({said(error)})") from error
            except Exception as error:  # Every library has exceptions of its own.
                line = str(error) if isinstance(error, GaveUp) else f"{where}: {said(error)}"
                last = attempts > self._limits.retries
                if last and isinstance(error, GaveUp):
                    raise
                if last or isinstance(error, PermissionError):
                    tried = f"attempt {attempts} of {1 + self._limits.retries}, data.remote.retries"
                    raise StorageError(f"{line} ({tried})") from error
            log.warning("%s; asking again in %s s", line, pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def _path(self, name: str) -> str:
        return f"{self.folder.path}/{name}"

    def _ask(self, method: str, *arguments: object, **keywords: object) -> Any:
        """Calls a method of the store's library. Raises TimeoutError where it takes too long."""
        fs = self.folder.fs
        if not fs.async_impl:
            return getattr(fs, method)(*arguments, **keywords)
        from fsspec.asyn import sync
        from fsspec.exceptions import FSTimeoutError

        seconds = self._limits.timeout_seconds
        try:
            return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=seconds, **keywords)
        except FSTimeoutError:
            raise TimeoutError(f"no answer within {seconds} s (data.remote.timeout_seconds)") from None

    def _size(self, name: str) -> int | None:
        """What an HTTP server says; None: nothing; -1: the file is missing."""
        try:
            size: int | None = self._ask("info", self._path(name))["size"]
        except FileNotFoundError:  # Whatever went wrong. To read a byte tells what.
            try:
                self._ask("cat_file", self._path(name), start=0, end=1)
            except FileNotFoundError:
                return -1
            raise ConnectionError("the server answers GET, and not HEAD") from None
        return size
