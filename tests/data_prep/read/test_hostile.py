"""Input that was made to break a reader: bounded memory, a name for what is wrong, and never a crash."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatrain.data_prep.read.config import ReadConfig
from megatrain.data_prep.read.files import Piece, find_files
from megatrain.data_prep.read.html import BadPageError, extract
from megatrain.data_prep.read.reader import read_unit
from megatrain.errors import InputError
from tests.data_prep.read.reading import COLUMNS, READ, all_of, texts

GIB = 1 << 30

PROGRAM = """
import json, re, sys
from collections import Counter
from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import find_files, plan
from megatrain.data_prep.read.reader import read_unit

found, broken = Counter(), {}
for unit in plan(find_files(sys.argv[1])[0], 1 << 26):
    note = lambda name, problem: found.update([f"{name} {problem.kind}"])
    for documents in read_unit(unit, ColumnsConfig(), ReadConfig(), note, broken.__setitem__):
        found["documents"] += len(documents)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]  # ru_maxrss counts the parent's
print(json.dumps([found, broken, int(peak) * 1024]))
"""


def one_line(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(GIB)  # a hole: zeros that take no disk
        file.seek(GIB)
        file.write(b'\n{"text": "after it"}\n')


def greedy_xz() -> bytes:
    """A good .xz, but for its header, which asks for 3 GiB."""
    data = bytearray(lzma.compress(b'{"text": "x"}'))
    begin, size = 12, (data[12] + 1) * 4
    data[begin + 4] = 39
    data[begin + size - 4 : begin + size] = struct.pack("<I", zlib.crc32(data[begin : begin + size - 4]))
    return bytes(data)


def dictionary_bomb(path: Path) -> None:
    """A terabyte of text in a kilobyte: a million times the same megabyte."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": values}), path, compression="zstd", store_schema=False)


def test_memory_is_bounded(tmp_path: Path) -> None:
    one_line(tmp_path / "line.jsonl")
    zeros = bytes(1 << 22)
    zipped = gzip.compress(zeros) * 300
    (tmp_path / "bomb.jsonl.gz").write_bytes(zipped)
    (tmp_path / "bomb.txt.zst").write_bytes(zstandard.compress(zeros) * 300)
    (tmp_path / "bomb.csv.xz").write_bytes(lzma.compress(zeros, preset=0) * 300)
    (tmp_path / "bomb.warc.gz").write_bytes(gzip.compress(b"WARC/1.0\r\nContent-Length: 99999999999\r\n\r\n") + zipped)
    (tmp_path / "greedy.jsonl.xz").write_bytes(greedy_xz())
    dictionary_bomb(tmp_path / "bomb.parquet")
    rows = ["x" * (20 << 20)] * 4 + ["a row of 20 MB is too long, this isn't"]
    pq.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet", use_dictionary=False, compression="none")
    (tmp_path / "tags.html").write_bytes(b"<div>" * 500_000)
    (tmp_path / "wide.html").write_bytes(b"<p>x" * 780_000)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found, broken, peak = json.loads(ended.stdout)
    assert found == {
        "line.jsonl too_long": 1,
        "rows.parquet too_long": 4,
        "tags.html nested": 1,
        "documents": 3,
    }
    bombs = {name for name, why in broken.items() if why.startswith("a bomb: grows more than 100 times")}
    assert bombs == {"bomb.jsonl.gz", "bomb.txt.zst", "bomb.csv.xz", "bomb.warc.gz", "bomb.parquet"}
    assert broken.keys() - bombs == {"greedy.jsonl.xz"}
    assert "Memory usage limit" in broken["greedy.jsonl.xz"]
    assert peak < GIB


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("<div>" * 513, "nested"),
        ("<p>" + "".join(f"<b a={n}>" for n in range(400)) + "<p>x" * 10_000, "nested"),
        ("<!-- \0 --> &#0; <a" + " a" * 100_000 + ">", None),
        ("<div>" * 500 + "deep enough" + "</div>" * 500, None),
        ("x" * (READ.max_page_bytes + 1), "too_long"),
    ],
)
def test_page_bombs(page: str, kind: str | None) -> None:
    if kind is None:
        extract(page.encode(), None, READ)
        return
    with pytest.raises(BadPageError, match=kind):
        extract(page.encode(), None, READ)


@pytest.mark.parametrize("charset", ["zlib", "x" * 10_000, "utf-7", "punycode", "\0"])
def test_charsets_that_are_none(charset: str) -> None:
    assert extract(b"<p>plain text</p>", charset, READ).text == "plain text"


def test_odd_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"nul \0 and \x1b[1mcolour")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"9" * 10_000 + b'", "n": ' + b"9" * 10_000 + b"}\n{}")
    assert texts(all_of(tmp_path / "a.txt")) == ["nul \0 and \x1b[1mcolour"]
    assert texts(all_of(tmp_path / "a.jsonl")) == ["invalid_json", "no_text"]


def test_archives_of_files_are_named_and_never_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "../../escaped.txt")
    files, ignored = find_files(str(tmp_path))
    assert [file.name for file in files] == ["a.txt"]
    assert ignored == {".tar": 1}
    with pytest.raises(InputError, match=r"input=.*a\.tar: the suffix is none of"):
        find_files(str(tmp_path / "a.tar"))


def sources() -> dict[str, bytes]:
    """A small file of each format."""
    rows = [{"text": f"text {n} \u8336", "id": str(n), "n": n} for n in range(50)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    warc = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 51\r\n\r\nHTTP/1.1 200 OK\r\n"
    warc += b"Content-Type: text/html\r\n\r\n<p>x</p>\r\n\r\n"
    table = pa.Table.from_pylist(rows)
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pq.write_table(table, parquet, compression="zstd")
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.xz": lzma.compress(lines),
        "a.csv": b"text,id\n" + b'"a ""b""",1\n' * 50,
        "a.html": b"<html><body><p>text <b>bold</b></p><table><tr><td>1</table></body></html>",
        "a.warc": warc * 5,
        "a.parquet": parquet.getvalue().to_pybytes(),
        "a.arrows": arrow.getvalue().to_pybytes(),
    }


@pytest.mark.parametrize("name", sources())
def test_damaged_files_raise_nothing(tmp_path: Path, name: str) -> None:
    """Bytes altered, removed and repeated at random: each file is read, has problems, or is broken."""
    chance = random.Random(name)
    seen: Counter[str] = Counter()
    whole = sources()[name]
    for number in range(60):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(data))
            length = chance.randint(1, 40)
            data[place : place + length] = chance.choice(
                (chance.randbytes(1), chance.randbytes(length), b"", data[place : place + length] * 2)
            ) + (data[place + 1 : place + length] if chance.random() < 0.5 else b"")
        path = tmp_path / f"{number}{name}"
        path.write_bytes(data)

        def tell(kind: str) -> Callable[[str, object], None]:
            return lambda *_: seen.update([kind])

        piece = Piece(str(path), name, len(data))
        for documents in read_unit((piece,), COLUMNS, ReadConfig(), tell("problem"), tell("broken")):
            seen["documents"] += len(documents)
    assert seen["broken"] + seen["problem"] + seen["documents"] > 0
