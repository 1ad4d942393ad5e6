"""Folders on a file system or in an object store: opening one by its URL, listing it, reading from it. No torch.

Design choices:
- A folder is a pathlib.Path or, where it was given as a URL, a UPath (universal_pathlib over fsspec). Only this file,
  checkpoint/remote.py, which writes, and data/remote.py, which reads with time limits, know the difference.
- An object store is slow at requests and charges for them. So a folder is listed once, with the sizes of its files; a
  file whose size is known is read without being looked up; and reads go out many at a time.
- Whatever a store's library raises becomes a StorageError of one line. Retries are the library's own.
- No listing is kept by the store's library: another process may have changed what is there.
- UPath is imported where a URL is opened: a run on a file system doesn't wait for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from urllib.parse import urlsplit

import numpy as np

from megatrain.errors import GaveUp, InputError, bad_value

if TYPE_CHECKING:
    from upath import UPath

Folder: TypeAlias = "Path | UPath"
"""A folder or a file, local or remote."""
Range = tuple[str, int, int]
"""Bytes [start, stop) of the file of that name in a folder."""

URL = re.compile(r"file:(//)?/[^/]|(?!file:)[a-z][a-z0-9+.-]*://[^/]")
"""How a URL begins: the protocol and a bucket, or an absolute path."""
LEGAL = "give the URL of a folder: s3://BUCKET/RUN, gs://BUCKET/RUN, file:/FOLDER or another that fsspec knows"
OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "s3": {"max_concurrency": 4},  # Parts of 50 MB that a rank which copies has in memory at once; it would be 10.
}

REMOTE_CALL_BYTES = 8 * 1024 * 1024
"""Bytes of one request to a store: a request takes tens of milliseconds before its first byte."""
BYTES_IN_FLIGHT = 64 * 1024 * 1024
"""Bytes asked for at once: what reading from a store may take of a host's memory."""
SECRETS = re.compile(r"(?<=://)[^/\s]*@|\?[^\s\"']*=[^\s\"']*")
"""What a URL in an error may hold that is nobody's business: a password, a signature."""


class StorageError(GaveUp, OSError):
    """A remote store can't be reached, or refuses."""


def said(error: Exception) -> str:
    """What a store's library says, on one line and without secrets."""
    return SECRETS.sub("", " ".join(str(error).split())) or type(error).__name__


def root(url: str, key: str) -> UPath:
    """The folder at `url`. Nothing is asked of the store yet. What is below it may be used on any thread.

    Raises InputError naming `key`: no URL, an unknown protocol, or one whose package (s3fs, gcsfs) isn't installed.
    """
    if not URL.match(url):
        raise bad_value(key, url, LEGAL)
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        # Not repeated: it would stand in logs, as the URL would in the saved configuration.
        raise InputError(f"{key}: the URL may hold a secret; give credentials as the store's library finds them")
    from upath import UPath

    try:
        path: UPath = UPath(url, use_listings_cache=False, **OPTIONS.get(parts.scheme, {}))
        path.fs.invalidate_cache()  # The first thing asked of it loads its package.
    except Exception as error:  # Every library has exceptions of its own.
        raise bad_value(key, url, f"{said(error)}; {LEGAL}") from error
    return path


@contextmanager
def one_line(path: Folder) -> Iterator[None]:
    """Turns what a store's library raises about `path` into StorageError. FileNotFoundError stays one."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing ({said(error)})") from error
    except Exception as error:
        # Every library has exceptions of its own, and only calls into one stand in this block.
        raise StorageError(f"{path}: {said(error)}") from error


def listing(folder: Folder) -> dict[str, int | None]:
    """What `folder` holds: the size of each file, and None for what is none. Nothing where there is no such folder."""
    found: dict[str, int | None] = {}
    with suppress(FileNotFoundError, NotADirectoryError):
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        found[entry.name] = entry.stat().st_size if entry.is_file() else None
        else:
            with one_line(folder):
                found.update(map(listing_entry, folder.fs.ls(folder.path, detail=True)))
    return found


def listing_entry(info: dict[str, Any]) -> tuple[str, int | None]:
    """Name and size of one entry of fsspec's listing of a folder; None where it is no file."""
    return info["name"].rstrip("/").rpartition("/")[2], info["size"] if info["type"] == "file" else None


def read_file(path: Folder, size: int) -> bytes:
    """A whole file of `size` bytes. Raises FileNotFoundError; another size is not noticed: check its hash."""
    if isinstance(path, Path):
        return path.read_bytes()
    with one_line(path):
        # Without a range it would be looked up first; an empty file has no range.
        return cast(bytes, path.fs.cat_file(path.path, start=0, end=size)) if size else b""


def read_ranges(folder: Folder, ranges: Sequence[Range]) -> Iterator[memoryview]:
    """The bytes of each range, in order. A view is valid until the next one.

    A view is shorter than its range where the file ends before. Raises FileNotFoundError, OSError.
    """
    if isinstance(folder, Path):
        yield from _read_local(folder, ranges)
        return
    for batch in _batches(ranges):
        names, starts, stops = map(list, zip(*batch, strict=True))
        paths = [f"{folder.path}/{name}" for name in names]
        with one_line(folder):
            blocks: list[bytes] = folder.fs.cat_ranges(paths, starts, stops, on_error="raise")
        for block in blocks:
            yield memoryview(block)


def _read_local(folder: Path, ranges: Sequence[Range]) -> Iterator[memoryview]:
    """Opens a file for each run of its ranges, not for longer: a thousand ranks' files would use up descriptors."""
    buffer = np.empty(max((stop - start for _, start, stop in ranges), default=0), np.uint8).data
    for name, group in groupby(ranges, key=itemgetter(0)):
        with (folder / name).open("rb", buffering=0) as file:
            for _, start, stop in group:
                file.seek(start)
                filled = 0
                while filled < stop - start and (count := file.readinto(buffer[filled : stop - start])):
                    filled += count
                yield buffer[:filled]


def _batches(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Cuts them where a batch would have more than BYTES_IN_FLIGHT."""
    batch: list[Range] = []
    size = 0
    for name, start, stop in ranges:
        if batch and size + stop - start > BYTES_IN_FLIGHT:
            yield batch
            batch, size = [], 0
        batch.append((name, start, stop))
        size += stop - start
    if batch:
        yield batch
