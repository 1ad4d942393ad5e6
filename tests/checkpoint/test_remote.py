"""Checkpoints in an object store: copied, found again, read by range; in memory, in a folder, on a real S3 server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from megatrain import storage
from megatrain.checkpoint import remote as remotes
from megatrain.checkpoint.folders import every, newest, problem_of, resolve, step_folder
from megatrain.checkpoint.format import CHUNK_BYTES, BrokenCheckpoint
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.engines.ranges import MASTER
from megatrain.errors import InputError
from megatrain.storage import StorageError
from tests.checkpoint.layouts import even_layout, random_whole, write
from tests.s3 import S3Server

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (500, 200), "head": (200, 500)}
WHOLE = random_whole(SHAPES)
RANKS = 2
Url = str


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Url:
    """Where nothing is yet."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3').new_bucket()}/run"
    return {"memory": f"memory://{uuid4().hex}/run", "file": f"file:{tmp_path}/remote/run"}[request.param]


@pytest.fixture
def s3_url(s3: S3Server) -> Url:
    return f"{s3.new_bucket()}/run"


def save(run_dir: Path, step: int, ranks: int = RANKS) -> Path:
    folder = step_folder(run_dir, step)
    write(folder, even_layout(SHAPES, ranks), WHOLE, step)
    return folder


def upload(folder: Path, url: Url, ranks: int = RANKS) -> None:
    remote = storage.root(url, "saving.remote")
    for rank in range(ranks):
        remotes.upload_rank(folder, remote, rank)
    remotes.upload_commit(folder, remote)


def assert_reads(reader: CheckpointReader, name: str, start: int, stop: int) -> None:
    """The range has the bits it had when it was written."""
    expected = WHOLE[name][MASTER].flatten()[start:stop]
    assert torch.equal(reader.read(MASTER, name, start, stop).view(torch.int32), expected.view(torch.int32))


def test_what_was_copied_is_found_and_read(tmp_path: Path, url: Url) -> None:
    assert newest(tmp_path / "empty", url) == (None, [])
    upload(save(tmp_path / "run", 10), url)
    folder = step_folder(storage.root(url, "saving.remote"), 10)
    assert newest(tmp_path / "empty", url) == (folder, [])
    assert resolve(url) == resolve(f"{url}/checkpoints/step_00000010") == folder
    reader = CheckpointReader(folder)
    assert_reads(reader, "head", 40_000, 60_123)
    assert_reads(reader, "embedding", 0, 100_000)
    assert reader.read(MASTER, "head", 7, 7).numel() == 0
    reader.verify_all()


def test_local_and_copied_ones_are_one_list(tmp_path: Path, url: Url) -> None:
    for step in (10, 20):
        upload(save(tmp_path / "run", step), url)
    shutil.rmtree(step_folder(tmp_path / "run", 20))
    remote, run_dir = storage.root(url, "saving.remote"), tmp_path / "run"
    places = [step_folder(remote, 20), step_folder(run_dir, 10), step_folder(remote, 10)]
    assert [(one.path, one.problem) for one in every(run_dir, url)] == [(place, None) for place in places]
    assert newest(run_dir, url) == (step_folder(remote, 20), [])
    assert newest(run_dir) == (step_folder(run_dir, 10), [])


def test_a_copy_that_never_ended_is_passed_over(tmp_path: Path, url: Url) -> None:
    upload(save(tmp_path / "run", 10), url)
    folder, remote = save(tmp_path / "run", 20), storage.root(url, "saving.remote")
    remotes.upload_rank(folder, remote, 0)
    said = [f"{step_folder(remote, 20)}: uncommitted (it has no commit.json)"]
    assert newest(tmp_path / "empty", url) == (step_folder(remote, 10), said)
    with pytest.raises(StorageError, match=r"step_00000020/rank_00001\.\w+: 0 bytes of \d+ are there"):
        remotes.upload_commit(folder, remote)
    assert newest(tmp_path / "empty", url) == (step_folder(remote, 10), said)
    remotes.upload_rank(folder, remote, 1)
    remotes.upload_commit(folder, remote)
    assert newest(tmp_path / "empty", url) == (step_folder(remote, 20), [])


def test_a_step_copied_again_is_none_until_it_is_whole(tmp_path: Path, url: Url) -> None:
    folder, copy = save(tmp_path / "run", 10), step_folder(storage.root(url, "saving.remote"), 10)
    upload(folder, url)
    remotes.upload_rank(folder, storage.root(url, "saving.remote"), 1)
    assert problem_of(copy) == f"{copy}: uncommitted (it has no commit.json)"
    upload(folder, url)
    assert problem_of(copy) is None


def test_what_is_removed_is_gone(tmp_path: Path, url: Url) -> None:
    folder, copy = save(tmp_path / "run", 10), step_folder(storage.root(url, "saving.remote"), 10)
    upload(folder, url)
    for one in (folder, copy, folder, copy):
        remotes.remove(one)
        assert storage.listing(one) == {}
    assert every(tmp_path / "run", url) == []


def test_the_commit_record_is_removed_first(
    tmp_path: Path, s3: S3Server, s3_url: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy = save(tmp_path / "run", 10), step_folder(storage.root(s3_url, "saving.remote"), 10)
    upload(folder, s3_url)
    before = len(s3.requests())
    remotes.remove(copy)
    deletions = [line for line in s3.requests()[before:] if not line.startswith("GET")]
    assert [line.rpartition("/")[2] for line in deletions] == ["commit.json", f"{copy.drive}?delete"]

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remotes.remove(folder)
    assert len(list(folder.iterdir())) == 6
    assert problem_of(folder) == f"{folder}: uncommitted (it has no commit.json)"


def test_an_altered_byte_is_detected(tmp_path: Path, url: Url) -> None:
    upload(save(tmp_path / "run", 10), url)
    folder = step_folder(storage.root(url, "saving.remote"), 10)
    data = folder / "rank_00001.bin"
    altered = bytearray(data.read_bytes())
    altered[5 * CHUNK_BYTES + 9] ^= 16
    data.write_bytes(bytes(altered))
    reader = CheckpointReader(folder)
    assert_reads(reader, "embedding", 0, 60_000)
    with pytest.raises(BrokenCheckpoint, match=rf"{data}: chunk 5 \(of 65536 bytes\) is altered"):
        reader.verify_all()
    data.write_bytes(bytes(altered[:-1]))
    assert problem_of(folder) == f"{data}: {len(altered) - 1} bytes, {len(altered)} were written"
    with pytest.raises(BrokenCheckpoint, match=r"rank_00001\.bin: ends before its 1200000 bytes"):
        reader.verify_all()
    data.unlink()
    with pytest.raises(BrokenCheckpoint, match="removed while it was read"):
        reader.verify_all()


def test_a_read_of_many_requests_at_a_time_reads_the_same(
    tmp_path: Path, url: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatrain.checkpoint.reader.REMOTE_CALL_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(storage, "BYTES_IN_FLIGHT", 3 * CHUNK_BYTES)
    upload(save(tmp_path / "run", 10, ranks=5), url, ranks=5)
    reader = CheckpointReader(resolve(url))
    assert_reads(reader, "embedding", 0, 100_000)
    assert_reads(reader, "head", 1, 99_999)


def test_threads_read_at_the_same_time(tmp_path: Path, url: Url) -> None:
    upload(save(tmp_path / "run", 10), url)
    reader = CheckpointReader(resolve(url))
    with ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(assert_reads, reader, "head", i * 7_000, i * 9_000 + 11) for i in range(11)]:
            each.result()


@pytest.mark.parametrize("ranks", [2, 12])
def test_how_many_requests_it_takes(tmp_path: Path, s3: S3Server, s3_url: Url, ranks: int) -> None:
    upload(save(tmp_path / "run", 10, ranks), s3_url, ranks)
    folder = step_folder(storage.root(s3_url, "saving.remote"), 10)
    begin = len(s3.requests())
    reader = CheckpointReader(folder)
    # The listing (1,000 names a page), commit.json, state.json and index.json, however many ranks wrote.
    assert len(s3.requests()) == begin + 4
    assert_reads(reader, "head", 100, 100_000 // ranks)
    # The chunk hashes of one rank, and its data.
    assert len(s3.requests()) == begin + 6
    assert_reads(reader, "head", 0, 100_000)
    # The hashes of the others, and of each rank one piece.
    assert len(s3.requests()) == begin + 6 + (ranks - 1) + ranks
    assert all(line.startswith("GET") for line in s3.requests()[begin:])


def test_no_more_is_fetched_than_is_needed(tmp_path: Path, s3_url: Url) -> None:
    upload(save(tmp_path / "run", 10), s3_url)
    reader = CheckpointReader(resolve(s3_url))
    for number in range(20):
        start, stop = 997 * number, 49_000 - 1_003 * number  # Of one rank's half: a contiguous piece of its file.
        before = reader.bytes_read
        assert_reads(reader, "embedding", start, stop)
        needed = (stop - start) * 4
        assert needed <= reader.bytes_read - before <= needed + 2 * CHUNK_BYTES


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/mnt/copies", "saving.remote=/mnt/copies: give the URL of a folder: s3://BUCKET/RUN"),
        ("file:copies", "saving.remote=file:copies: give the URL"),
        ("s3://", "saving.remote=s3://: give the URL"),
        ("ftps3://bucket/run", "saving.remote=ftps3://bucket/run: Unsupported filesystem: 'ftps3'; give the URL"),
        (
            "gs://bucket/run",
            "saving.remote=gs://bucket/run: Please install gcsfs to access Google Storage; give the URL",
        ),
        ("s3://key:secret@bucket/run", "saving.remote: the URL may hold a secret; give credentials as"),
        ("https://host/run?X-Signature=secret", "saving.remote: the URL may hold a secret; give credentials as"),
    ],
)
def test_what_is_no_remote_is_one_clear_line(given: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # As where it isn't installed.
    with pytest.raises(InputError) as raised:
        storage.root(given, "saving.remote")
    assert str(raised.value).startswith(said)
    assert "secret@" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bucket_that_is_not_there_is_one_clear_line(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^saving\.remote=s3://nowhere/run: can't be written \(.*bucket does not exist"
    ):
        remotes.check_writable(storage.root("s3://nowhere/run", "saving.remote"))
    with pytest.raises(InputError, match=r"^checkpoint=s3://nowhere/run: no such folder; give a run directory"):
        resolve("s3://nowhere/run")
    with pytest.raises(
        OSError, match=r"^s3://nowhere/run/checkpoints/step_00000010/\S+: missing \(.*bucket does not"
    ) as e:
        upload(save(tmp_path, 10), "s3://nowhere/run")
    assert "\n" not in str(e.value)
    there = storage.root(s3.new_bucket() + "/run", "saving.remote")
    remotes.check_writable(there)
    assert storage.listing(there) == {}


UNREACHABLE = """
from megatrain import storage
from megatrain.checkpoint import remote, folders
from megatrain.errors import MegatrainError
URL = "s3://bucket/run"
for attempt in (lambda: folders.resolve(URL), lambda: remote.check_writable(storage.root(URL, "saving.remote"))):
    try:
        attempt()
    except MegatrainError as error:
        print(error.exit_code, error)
"""


def test_a_server_that_cannot_be_reached_is_one_clear_line() -> None:
    environment = os.environ | {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
    }
    command = [sys.executable, "-c", UNREACHABLE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    read, written = done.stdout.splitlines()
    assert read.startswith('3 s3://bucket/run: Could not connect to the endpoint URL: "http://127.0.0.1:9/bucket')
    assert written.startswith("2 saving.remote=s3://bucket/run: can't be written (s3://bucket/run: Could not connect")
    assert "secret" not in done.stdout + done.stderr


def test_errors_of_a_store_hold_no_secret() -> None:
    with pytest.raises(StorageError) as raised, storage.one_line(Path("x")):
        raise ValueError("403 for\n 'https://me:password@host/key?X-Amz-Signature=abc&a=b', why? url=c")
    assert str(raised.value) == "x: 403 for 'https://host/key', why? url=c"


def test_a_run_without_a_remote_does_not_wait_for_its_packages() -> None:
    code = "import sys, megatrain.checkpoint.folders; sys.exit(int('fsspec' in sys.modules or 'upath' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
