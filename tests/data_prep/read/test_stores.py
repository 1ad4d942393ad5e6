"""Input in object stores: what is found, what is read of it, and how failures are told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from megatrain.data_prep.read.files import Piece, find_files, plan
from megatrain.data_prep.read.reader import read_unit, sample
from megatrain.data_prep.read.records import Document
from megatrain.errors import InputError
from megatrain.storage import StorageError
from tests.data.http_server import Fault, serve
from tests.data_prep.read.reading import COLUMNS, READ, of_unit, texts
from tests.s3 import S3Server

LINES = b"".join(json.dumps({"text": f"line {n}" * (n % 7 + 1)}).encode() + b"\n" for n in range(200))


def fill(folder: Path | UPath) -> None:
    files = {"a/1.jsonl": LINES, "a/2.jsonl.gz": gzip.compress(LINES), "b/3.txt": b"three", "c.tar": b"x"}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["four"]}), buffer)
    (folder / "b" / "4.parquet").write_bytes(buffer.getvalue().to_pybytes())


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.distributed)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a folder with some files."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        url = f"{server.new_bucket()}/crawl"
    else:
        url = {"memory": f"memory://{uuid4().hex}/crawl", "file": f"file:{tmp_path}/crawl"}[request.param]
    fill(UPath(url))
    return url


def test_what_is_found(url: str) -> None:
    files, ignored = find_files(url)
    assert [file.name for file in files] == ["a/1.jsonl", "a/2.jsonl.gz", "b/3.txt", "b/4.parquet"]
    assert files[0].size == len(LINES)
    assert all(file.version for file in files)
    assert ignored == {".tar": 1}
    assert [file.name for file in find_files(f"{url}/b")[0]] == ["3.txt", "4.parquet"]
    assert [file.name for file in find_files(f"{url}/*/*.txt")[0]] == ["b/3.txt"]
    assert [file.name for file in find_files(f"{url}/b*")[0]] == ["b/3.txt", "b/4.parquet"]
    assert [file.name for file in find_files(f"{url}/b/3.txt")[0]] == ["3.txt"]


def test_what_is_read(url: str) -> None:
    files, _ = find_files(url)
    wanted = [json.loads(line)["text"] for line in LINES.splitlines()]
    for unit_bytes in (97, 1 << 20):
        found = [item for unit in plan(files, unit_bytes) for item in of_unit(unit)]
        assert texts(found) == [*wanted, *wanted, "three", "four"]
        assert len({item.id for item in found if isinstance(item, Document)}) == 402


def test_a_sample(url: str) -> None:
    files, _ = find_files(url)
    taken = list(sample(files, COLUMNS, READ, 3000))
    assert taken == list(sample(files, COLUMNS, READ, 3000))
    assert 2800 < sum(map(len, taken)) < 4000


@pytest.mark.parametrize("below", ["none", "*.none", "a/none.txt"])
def test_nothing_there(url: str, below: str) -> None:
    with pytest.raises(InputError, match=r"^input=.*: no file there with one of the suffixes \.txt"):
        find_files(f"{url}/{below}")


def test_a_suffix_that_isnt_known(url: str) -> None:
    with pytest.raises(InputError, match=r"^input=.*c\.tar: the suffix is none of \.txt"):
        find_files(f"{url}/c.tar")


def test_a_file_that_is_gone_fails_its_unit(url: str) -> None:
    with pytest.raises(StorageError, match=r"33\.txt"):
        of_unit((Piece(f"{url}/b/33.txt", "3.txt", 5),))


def test_a_file_over_http(tmp_path: Path) -> None:
    fill(tmp_path)
    with serve(tmp_path) as server:
        files, _ = find_files(f"{server.url}/a/2.jsonl.gz")
        (unit,) = plan(files, 1 << 20)
        assert len(of_unit(unit)) == 200
        cut = plan(find_files(f"{server.url}/a/1.jsonl")[0], 1000)
        assert sum(len(of_unit(unit)) for unit in cut) == 200
        server.spoil = lambda _name, _count: Fault.fail
        with pytest.raises(StorageError, match=r"^http://"):  # not the file's fault: the unit fails, and may be retried
            list(read_unit(unit, COLUMNS, READ, lambda *_: None, lambda *_: pytest.fail("broken")))
        with pytest.raises(StorageError):  # a sample of what can be reached would be another
            list(sample(files, COLUMNS, READ, 1000))
