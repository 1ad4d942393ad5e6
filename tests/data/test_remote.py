"""Sets in remote stores: a real HTTP server that fails in every way, a real S3 server, and fsspec's store in memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatrain.data import remote_folder
from megatrain.data.reader import BadMember, Int32
from megatrain.data.remote_folder import longest_wait
from megatrain.data.samples import open_sources, read_samples, take_bad_members
from megatrain.data_config import CacheConfig, DataConfig, RemoteConfig, WhenBad
from megatrain.errors import GaveUp, InputError
from megatrain.storage import StorageError, root
from tests.data.http_server import Fault, Server, serve
from tests.data.sets import EOS, flip_a_bit, write_set
from tests.s3 import S3Server

LENGTH = 10
SHARDS = [[[30, 20], [40], [25]], [[50], [7, 43]]]
"""Two shards of three members and two: 115 and 100 tokens, which are 12 samples and 10."""
RETRIES = 2
STALLED_SECONDS = 0.5
"""The limit of a request that is known to stall. Others have a long one: the machine may be busy."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves tmp_path, which holds the set `set`."""
    monkeypatch.setattr(remote_folder, "FIRST_PAUSE", 0.01)
    write_set(tmp_path / "set", SHARDS)
    with serve(tmp_path) as server:
        yield server


def config(path: str, cache: Path, when_bad: WhenBad = WhenBad.error, limit: int = 1 << 20) -> DataConfig:
    remote = RemoteConfig(timeout_seconds=60.0, retries=RETRIES)
    return DataConfig(path=path, bad_member=when_bad, remote=remote, cache=CacheConfig(path=str(cache), bytes=limit))


def read_all(data: DataConfig) -> Int32:
    """The ids of all samples of a set, in its own order."""
    sources = open_sources(data, LENGTH)
    count = sources[0].index.samples
    return read_samples(sources, np.zeros(count, np.int32), np.arange(count)).ids


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            target = root(url, "url") / path.relative_to(folder).as_posix()
            target.fs.pipe_file(target.path, path.read_bytes())


@pytest.mark.parametrize("protocol", ["http", "memory", "s3"])
@pytest.mark.parametrize("split", ["", "/train"])
def test_a_remote_set_is_read_like_a_local_one(
    server: Server, s3: S3Server, tmp_path: Path, protocol: str, split: str
) -> None:
    url = {"http": f"{server.url}/set", "memory": f"memory://{tmp_path.name}/set", "s3": ""}[protocol]
    if protocol == "s3":
        url = f"{s3.new_bucket()}/set"
    if protocol != "http":
        upload(tmp_path / "set", url)
    remote = config(url + split, tmp_path / "cache")
    assert np.array_equal(read_all(remote), read_all(DataConfig(path=str(tmp_path / "set"))))
    assert open_sources(remote, LENGTH)[0].tokenizer.read_bytes() == (tmp_path / "set/tokenizer.json").read_bytes()


def test_everything_is_fetched_once(server: Server, tmp_path: Path) -> None:
    data = config(f"{server.url}/set", tmp_path / "cache")
    expected = read_all(data)
    ranges = [request for request in server.requests if "tar bytes" in request]
    assert len(ranges) == len(set(ranges)) == 5
    server.requests.clear()
    assert np.array_equal(read_all(data), expected)
    assert server.requests == ["GET manifest.json", "HEAD shard-000000.tar", "HEAD shard-000001.tar"]


def test_ranks_of_a_node_share_what_they_fetch(server: Server, tmp_path: Path) -> None:
    server.delay = 0.02
    data = config(f"{server.url}/set", tmp_path / "cache")
    ranks = [open_sources(data, LENGTH) for _ in range(4)]
    together = threading.Barrier(4)

    def read(rank: int) -> Int32:
        together.wait()
        return read_samples(ranks[rank], np.zeros(22, np.int32), np.arange(22)).ids

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(read, range(4)))
    assert all(np.array_equal(ids, found[0]) for ids in found)
    assert sum("tar bytes" in request for request in server.requests) == 5


def test_members_of_a_step_are_fetched_at_once(server: Server, tmp_path: Path) -> None:
    sources = open_sources(config(f"{server.url}/set", tmp_path / "cache"), LENGTH)
    server.delay, server.most_at_once = 0.1, 0
    read_samples(sources, np.zeros(22, np.int32), np.arange(22))
    assert server.most_at_once >= 3


@pytest.mark.parametrize("fault", [Fault.drop, Fault.stall, Fault.truncate, Fault.flip, Fault.fail])
def test_a_server_that_recovers_changes_nothing(server: Server, tmp_path: Path, fault: Fault) -> None:
    expected = read_all(DataConfig(path=str(tmp_path / "set")))
    data = config(f"{server.url}/set", tmp_path / "cache", WhenBad.skip)
    sources = open_sources(data, LENGTH)
    server.counts.clear()
    server.spoil = lambda name, count: fault if count == 1 and name == "shard-000001.tar" else None
    data.remote.timeout_seconds = 2.0 if fault is Fault.stall else 60.0
    assert np.array_equal(read_samples(sources, np.zeros(22, np.int32), np.arange(22)).ids, expected)
    assert take_bad_members(sources) == []


SAYS = {
    Fault.drop: r"Response payload is not completed.*",
    Fault.stall: r"no answer within 0\.5 s \(data\.remote\.timeout_seconds\)",
    Fault.truncate: r"\d+ bytes came where \d+ were asked for",
    Fault.fail: r"500, message='Internal Server Error'.*",
    Fault.forbid: r"403, message='Forbidden'.*",
    Fault.no_ranges: r"\d+ bytes came where \d+ were asked for",
}


@pytest.mark.parametrize("when_bad", WhenBad)
@pytest.mark.parametrize("fault", SAYS)
def test_a_server_that_fails_is_named_in_time(server: Server, tmp_path: Path, fault: Fault, when_bad: WhenBad) -> None:
    """And never taken for a bad member."""
    data = config(f"{server.url}/set", tmp_path / "cache", when_bad)
    sources = open_sources(data, LENGTH)
    server.spoil = lambda name, _: fault if name == "shard-000001.tar" else None
    assert (read_samples(sources, np.zeros(12, np.int32), np.arange(12)).length > 0).all()
    data.remote.timeout_seconds = STALLED_SECONDS if fault is Fault.stall else 60.0
    before = time.perf_counter()
    with pytest.raises(StorageError) as raised:
        read_samples(sources, np.zeros(22, np.int32), np.arange(22))
    assert time.perf_counter() - before < 3 * STALLED_SECONDS + 10
    where = re.escape(f"{server.url}/set/train/shard-000001.tar")
    expected = rf"{where}: {SAYS[fault]} \(attempt 3 of 3, data\.remote\.retries\)"
    assert re.fullmatch(expected, str(raised.value)), str(raised.value)
    assert raised.value.exit_code == GaveUp.exit_code


def test_how_long_a_server_is_waited_for() -> None:
    assert longest_wait(RemoteConfig(timeout_seconds=30.0, retries=4)) == 5 * 30 + 0.5 + 1 + 2 + 4
    assert longest_wait(RemoteConfig(timeout_seconds=1.0, retries=8)) == 9 + 0.5 + 1 + 2 + 4 + 8 + 16 + 30 + 30


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "shard-000001.json"])
def test_a_server_that_fails_at_the_start_is_named(server: Server, tmp_path: Path, name: str) -> None:
    server.spoil = lambda asked, _: Fault.fail if asked == name else None
    with pytest.raises(StorageError, match=rf"{name}: {SAYS[Fault.fail]} \(attempt 3 of 3"):
        open_sources(config(f"{server.url}/set", tmp_path / "cache"), LENGTH)


def test_a_server_that_stalls_at_the_start_is_named(server: Server, tmp_path: Path) -> None:
    server.spoil = lambda _name, _count: Fault.stall
    data = config(f"{server.url}/set", tmp_path / "cache")
    data.remote.timeout_seconds = STALLED_SECONDS
    with pytest.raises(StorageError, match=rf"manifest\.json: {SAYS[Fault.stall]} \(attempt 3 of 3"):
        open_sources(data, LENGTH)


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_folder, "FIRST_PAUSE", 0.01)
    with pytest.raises(
        StorageError, match=r"^http://127\.0\.0\.1:9/train/manifest\.json: Cannot connect.*attempt 3 of 3"
    ):
        open_sources(config("http://127.0.0.1:9", tmp_path / "cache"), LENGTH)


@pytest.mark.parametrize("when_bad", WhenBad)
@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.json", "manifest.json", "tokenizer.json"])
def test_a_missing_file_is_named_at_the_start(server: Server, tmp_path: Path, name: str, when_bad: WhenBad) -> None:
    next((tmp_path / "set").rglob(name)).unlink()
    with pytest.raises(InputError, match=rf"/{name}: missing, and the manifest lists it|no train/manifest\.json in it"):
        open_sources(config(f"{server.url}/set", tmp_path / "cache", when_bad), LENGTH)


@pytest.mark.parametrize("when_bad", WhenBad)
def test_a_shard_that_goes_missing_is_an_error(server: Server, tmp_path: Path, when_bad: WhenBad) -> None:
    sources = open_sources(config(f"{server.url}/set", tmp_path / "cache", when_bad), LENGTH)
    (tmp_path / "set/train/shard-000001.tar").unlink()
    with pytest.raises(StorageError, match=r"/set/train/shard-000001\.tar: missing"):
        read_samples(sources, np.zeros(22, np.int32), np.arange(22))


@pytest.mark.parametrize("member", range(3))
def test_an_altered_member_is_an_error_or_skipped(server: Server, tmp_path: Path, member: int) -> None:
    expected = read_all(DataConfig(path=str(tmp_path / "set")))
    sources = open_sources(config(f"{server.url}/set", tmp_path / "cache"), LENGTH)
    opened = write_set(tmp_path / "again", SHARDS)
    flip_a_bit(opened, 0, member)
    opened.path(0).replace(tmp_path / "set/train/shard-000000.tar")
    line = f"{server.url}/set/train/shard-000000.tar: member 00000{member} was altered since it was written"
    with pytest.raises(BadMember, match=f"^{re.escape(line)}"):
        read_samples(sources, np.zeros(22, np.int32), np.arange(22))

    sources = open_sources(config(f"{server.url}/set", tmp_path / "cache", WhenBad.skip), LENGTH)
    server.requests.clear()
    for _ in range(2):
        raw = read_samples(sources, np.zeros(22, np.int32), np.arange(22))
        begin, end = [(0, 50), (50, 90), (90, 115)][member]
        touched = [LENGTH * i < end and min(LENGTH * i + LENGTH + 1, 115) > begin for i in range(12)] + [False] * 10
        assert (raw.length == 0).tolist() == touched
        assert (raw.ids[touched] == EOS).all()
        assert (raw.document[touched] == 0).all()
        assert np.array_equal(raw.ids[np.logical_not(touched)], expected[np.logical_not(touched)])
    assert [bad.startswith(line) for bad in take_bad_members(sources)] == [True]
    assert take_bad_members(sources) == []
    assert sum("tar bytes" in request for request in server.requests) == 1 + RETRIES


def test_a_shard_that_was_cut_off_is_an_error_or_skipped(server: Server, tmp_path: Path) -> None:
    expected = read_all(DataConfig(path=str(tmp_path / "set")))
    path = tmp_path / "set/train/shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-3000])  # In the second of three members.
    with pytest.raises(InputError, match=r"/shard-000000\.tar: has 4168 bytes, and the manifest says 7168"):
        open_sources(config(f"{server.url}/set", tmp_path / "cache"), LENGTH)
    sources = open_sources(config(f"{server.url}/set", tmp_path / "cache", WhenBad.skip), LENGTH)
    raw = read_samples(sources, np.zeros(22, np.int32), np.arange(22))
    assert (raw.length == 0).tolist() == [i in range(8, 12) for i in range(22)]
    assert np.array_equal(raw.ids[raw.length > 0], expected[raw.length > 0])
    assert [line.partition(": ")[2] for line in take_bad_members(sources)] == [
        "member 000002 lies beyond the end of the tar, which was cut off"
    ]


def test_a_cache_of_one_member_is_enough(server: Server, tmp_path: Path) -> None:
    data = config(f"{server.url}/set", tmp_path / "cache", limit=300)
    assert np.array_equal(read_all(data), read_all(DataConfig(path=str(tmp_path / "set"))))
    assert sum(path.stat().st_size for path in (tmp_path / "cache/members").iterdir()) <= 300


@pytest.mark.parametrize("damage", [b"", b"\1" * 216])
def test_a_damaged_cache_is_fetched_again(server: Server, tmp_path: Path, damage: bytes) -> None:
    data = config(f"{server.url}/set", tmp_path / "cache")
    expected = read_all(data)
    for path in [*(tmp_path / "cache/members").iterdir(), *(tmp_path / "cache/sets").rglob("*.json")]:
        path.write_bytes(damage)
    assert np.array_equal(read_all(data), expected)


def test_another_manifest_is_another_copy(server: Server, tmp_path: Path) -> None:
    data = config(f"{server.url}/set", tmp_path / "cache")
    first = read_all(data)
    write_set(tmp_path / "other", [[[60]], *SHARDS])
    (tmp_path / "set").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "set")
    assert len(read_all(data)) > len(first)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere://bucket/set", r"data\.path=nowhere://bucket/set: Unsupported filesystem"),
        ("s3://key:secret@bucket/set", r"data\.path: the URL may hold a secret"),
    ],
)
def test_a_url_that_cannot_be_had_is_one_line(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_sources(config(url, tmp_path / "cache"), LENGTH)
