from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import xxhash

from megatrain.data.cache import ABANDONED_SECONDS, Cache
from megatrain.data_config import CacheConfig
from megatrain.errors import GaveUp, InputError


def member(number: int, size: int = 100) -> tuple[str, bytes]:
    """A member's hash and bytes."""
    data = bytes([number]) * size
    return xxhash.xxh3_128_hexdigest(data), data


def held(cache: Cache) -> list[int]:
    """The numbers of the members in the folder."""
    return sorted(path.read_bytes()[0] for path in (cache.folder / "members").glob("[!.]*"))


def new(folder: Path, limit: int = 10_000) -> Cache:
    return Cache(CacheConfig(path=str(folder), bytes=limit))


def test_what_is_put_is_found_also_by_another(tmp_path: Path) -> None:
    digest, data = member(1)
    cache = new(tmp_path)
    assert cache.get(digest) is None
    assert cache.put(digest, data[:30], data[30:])[:] == data
    for each in (cache, new(tmp_path)):
        found = each.get(digest)
        assert found is not None
        assert found[:] == data


@pytest.mark.parametrize("damage", [b"", b"x", b"\1" * 99 + b"\2"])
def test_a_damaged_file_is_dropped(tmp_path: Path, damage: bytes) -> None:
    digest, data = member(1)
    cache = new(tmp_path)
    cache.put(digest, data)
    (tmp_path / "members" / digest).write_bytes(damage)
    assert cache.get(digest) is None
    assert held(cache) == []
    assert cache.put(digest, data)[:] == data


def test_the_oldest_go_first_and_what_is_mapped_stays_readable(tmp_path: Path) -> None:
    cache = new(tmp_path, limit=400)
    mapped = [cache.put(*member(number)) for number in range(3)]
    for number in range(3):
        os.utime(tmp_path / "members" / member(number)[0], (number, number))
    assert cache.get(member(0)[0]) is not None  # Now the youngest.
    cache.put(*member(3))
    assert held(cache) == [0, 2, 3]
    assert mapped[1][:] == member(1)[1]
    cache.put(*member(4, size=350))
    assert held(cache) == [4]
    assert cache.put(*member(5, size=1000))[:] == member(5, 1000)[1]  # Larger than the whole cache.
    assert held(cache) == []


def test_what_earlier_runs_left_counts(tmp_path: Path) -> None:
    for number in range(5):
        new(tmp_path, limit=10_000).put(*member(number))
    left = tmp_path / "members" / ".temporary"
    left.write_bytes(b"1")
    young = tmp_path / "members" / ".young"
    young.write_bytes(b"1")
    then = time.time() - 2 * ABANDONED_SECONDS
    os.utime(left, (then, then))
    cache = new(tmp_path, limit=300)
    cache.put(*member(9))
    assert len(held(cache)) == 2
    assert not left.exists()
    assert young.exists()


HAMMER = """
import random, sys, xxhash
from megatrain.data_config import CacheConfig
from megatrain.data.cache import Cache
cache, chance = Cache(CacheConfig(path=sys.argv[1], bytes=64_000)), random.Random(int(sys.argv[2]))
for _ in range(400):
    data = bytes([chance.randrange(100)]) * 1000
    digest = xxhash.xxh3_128_hexdigest(data)
    with cache.alone(digest):
        found = cache.get(digest) or cache.put(digest, data)
    assert found[:] == data
"""
"""A process that uses more members than the cache holds."""


def test_processes_share_it(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", HAMMER, str(tmp_path), str(seed)] for seed in range(3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (0, "")
    files = list((tmp_path / "members").iterdir())
    assert 40 <= len(files) <= 64
    assert all(xxhash.xxh3_128_hexdigest(path.read_bytes()) == path.name for path in files)


def test_alone_means_one_at_a_time(tmp_path: Path) -> None:
    cache = new(tmp_path)
    inside = threading.Event()
    digest = member(1)[0]

    def other() -> None:
        with cache.alone(digest):
            inside.set()

    with cache.alone(digest):
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.1)
    assert inside.wait(10)
    thread.join()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"data\.cache\.path={tmp_path}/file/cache: Not a directory; legal: a folder"):
        new(tmp_path / "file" / "cache")
    cache = new(tmp_path / "cache")
    (tmp_path / "cache" / "members").rmdir()
    with pytest.raises(GaveUp, match=rf"data\.cache\.path={tmp_path}/cache: No such file or directory"):
        cache.put(*member(1))


def test_the_default_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = Cache(CacheConfig())
    assert cache.folder == tmp_path / f"megatrain-{os.getuid()}"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "megatrain-12345").mkdir()
    with pytest.raises(InputError, match=r"megatrain-12345: it is another user's"):
        Cache(CacheConfig())
