"""Law 6 for one small file: written under a temporary name, synced, renamed; and the sync of a folder.

Design choices:
- A rename is durable only once the folder that holds the name is synced, so both are one function here.
- The temporary name is random: ranks that write the same file at once don't share it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_to_sync(file: BinaryIO, start: int = 0) -> None:
    """Has the disk begin with what was written to `file` from byte `start` on; os.fsync waits for it.

    Linux begins to write dirty pages when told that they won't be needed, and keeps those that it hasn't written yet.
    """
    file.flush()
    os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def write_synced(path: Path, data: bytes) -> None:
    """Writes `data` and syncs it. For files that nobody reads before a commit record names them."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: whoever reads sees what was there before, or all of it; durable on return."""
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
