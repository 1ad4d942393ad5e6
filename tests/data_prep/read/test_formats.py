"""Every format that is read: what becomes of its documents, and of what isn't right in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import find_files
from megatrain.data_prep.read.reader import require
from megatrain.data_prep.read.records import BrokenFileError, Document, Problem
from megatrain.errors import InputError
from tests.data_prep.read.reading import PACKINGS, all_of, texts

PAGE = """<html><head><title>On  tea</title><meta charset="{charset}"></head><body><nav><a href="/">Home</a></nav>
<main><h1>Tea</h1><p>{text}</p></main><footer>Cookies</footer></body></html>"""
PROSE = "Black tea is left to oxidize, green tea isn\u2019t; both are leaves of one plant, and that is the whole story."


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("packing", PACKINGS)
def test_tables_as_text(tmp_path: Path, suffix: str, delimiter: str, packing: str) -> None:
    head = delimiter.join(("id", "text", "url", "stars"))
    rows = ['7,"one ""1""\nand, more",u,3', ",two,,", "", "9,,u,1", "9", "1,2,3,4,5"]
    data = "\r\n".join([head, *(row.replace(",", delimiter) for row in rows)]).encode()
    path = write(tmp_path / f"a{suffix}{packing}", PACKINGS[packing](b"\xef\xbb\xbf" + data))
    places = [3 + data.index(row.replace(",", delimiter).encode()) for row in rows[1:2] + rows[3:]]
    places[2] = places[1] + len(rows[3]) + 2
    assert all_of(path) == [
        Document("7", f'one "1"\nand{delimiter} more', "u", None, None, '{"stars": "3"}'),
        Document(f"{path.name}:{places[0]}", "two"),
        Problem("empty", f"{path.name}:{places[1]}"),
        Problem("no_text", f"{path.name}:{places[2]}"),
        Problem("invalid_csv", f"{path.name}:{places[3]}"),
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1), min_size=1))
def test_what_the_csv_module_writes_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "n"], *([row, n] for n, row in enumerate(rows))])
    found = [item for item in all_of(path) if isinstance(item, Document)]
    assert [item.text for item in found] == [row for row in rows if not row.isspace()]


def test_bad_lines_of_a_table(tmp_path: Path) -> None:
    rows = [
        "text,n",
        "one,1",
        "\udcff,2",
        '"' + "x" * 50,
        "long" * 20,
        "after,5",
        '"never closed,6',
        "y" * 30,
        "z" * 30,
    ]
    path = write(tmp_path / "a.csv", "\n".join([*rows, "last,9"]).encode("utf-8", "surrogateescape"))
    found = all_of(path, config=ReadConfig(max_document_bytes=70))
    assert texts(found) == ["one", "after", "last", "not_utf8", "too_long", "too_long"]


def test_a_table_without_the_text_column(tmp_path: Path) -> None:
    for data in (b"a,b\n1,2", b"", b"\xff\n"):
        with pytest.raises(BrokenFileError, match=r"no column 'text' \(columns.text=\) in its first line"):
            all_of(write(tmp_path / "a.csv", data))


TABLE = pa.table(
    {
        "text": ["one", None, "", " ", "x" * 100, "two"],
        "id": pa.array([1, 2, 3, 4, 5, None]),
        "source": pa.array(["s"] * 6, pa.dictionary(pa.int8(), pa.string())),
        "tags": [["a", "b"], [], [], [], [], None],
    }
)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table, max_chunksize=4)


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=3)


COLUMNAR = {"a.arrows": write_stream, "b.arrow": write_stream, "c.arrow": write_arrow, "d.parquet": write_parquet}


@pytest.mark.parametrize(("name", "save"), COLUMNAR.items())
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_columnar(tmp_path: Path, name: str, save: Callable[[pa.Table, Path], None], kind: pa.DataType) -> None:
    table = TABLE.set_column(0, "text", TABLE["text"].cast(kind))
    save(table, tmp_path / name)
    found = all_of(tmp_path / name, config=ReadConfig(max_document_bytes=99))
    assert found[:2] == [
        Document("1", "one", None, "s", None, '{"tags": ["a", "b"]}'),
        Document(f"{name}:5", "two", None, "s", None, '{"tags": null}'),
    ]
    kinds = {1: "no_text", 2: "empty", 3: "empty", 4: "too_long"}
    assert sorted(found[2:]) == sorted(Problem(kind, f"{name}:{row}") for row, kind in kinds.items())


@pytest.mark.parametrize("name", COLUMNAR)
@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.string()), pa.bool_()])
def test_a_text_column_that_holds_no_text(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    COLUMNAR[name](pa.table({"text": pa.array([None], kind)}), tmp_path / name)
    with pytest.raises(BrokenFileError, match=r"the column 'text' \(columns.text=\) holds .*, not text"):
        all_of(tmp_path / name)


def test_columns_of_a_table_are_named_by_the_configuration(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["one"], "text": ["other"], "key": ["k"]}), tmp_path / "a.parquet")
    found = all_of(tmp_path / "a.parquet", ColumnsConfig(text="content", id="key"))
    assert found == [Document("k", "one", metadata='{"text": "other"}')]


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize("charset", ["utf-8", "windows-1252"])
def test_html(tmp_path: Path, extractor: str, charset: str) -> None:
    pytest.importorskip(extractor, exc_type=ImportError)
    path = write(tmp_path / "a.html", PAGE.format(charset=charset, text=PROSE).encode(charset))
    (found,) = all_of(path, config=ReadConfig(html=extractor))
    assert isinstance(found, Document)
    assert PROSE in found.text
    assert "Cookies" not in found.text
    assert "Home" not in found.text
    assert json.loads(found.metadata or "") == {
        "title": "On tea",
        "charset": {"utf-8": "utf-8", "windows-1252": "cp1252"}[charset],
    }


def test_bytes_of_html_that_dont_decode(tmp_path: Path) -> None:
    data = PAGE.format(charset="utf-8", text="caf? au lait").encode().replace(b"?", b"\xe9")
    (found,) = all_of(write(tmp_path / "a.htm", data))
    assert isinstance(found, Document)
    assert "caf\ufffd au lait" in found.text


def record(kind: str, url: str, body: bytes, headers: str = "") -> bytes:
    content = {"response": "application/http; msgtype=response", "conversion": "text/plain"}.get(kind, "x/y")
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
    head += f"WARC-Record-ID: <urn:uuid:id-of-{url}>\r\nContent-Type: {content}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def response(body: bytes, status: str = "200 OK", headers: str = "Content-Type: text/html") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body


@pytest.mark.parametrize("packing", PACKINGS)
def test_warc(tmp_path: Path, packing: str) -> None:
    page = PAGE.format(charset="", text="Tee schmeckt überall").encode("latin-1")
    tea = PAGE.format(charset="", text="茶是饮料。").encode()
    chunks = b"5\r\n<p>ch\r\n7\r\nunks</p\r\n1\r\n>\r\n0\r\n\r\n"
    squeezed = "Content-Type: text/html; charset=utf-8\r\nContent-Encoding: gzip"
    records = [
        record("warcinfo", "w", b"software: x\r\n"),
        record("request", "a", b"GET / HTTP/1.1\r\n\r\n"),
        record("response", "a", response(page, headers="Content-Type: text/html; charset=iso-8859-1")),
        record("response", "b", response(page, status="404 Not Found")),
        record("response", "c", response(b"\x89PNG", headers="Content-Type: image/png")),
        record("response", "d", response(PACKINGS[".gz"](tea), headers=squeezed)),
        record("response", "e", response(b"\x1f\x8bnot gzip", headers=squeezed)),
        record("response", "f", b"\0\xff"),
        record("response", "g", response(b"<p> </p>")),
        record("response", "h", response(b"\x8b\0", headers="Content-Type: text/html\r\nContent-Encoding: br")),
        record("response", "i", response(chunks, headers="Content-Type: text/html\r\nTransfer-Encoding: chunked")),
    ]
    data = b"".join(map(PACKINGS[packing], records))  # a member each, as archives have it
    path = write(tmp_path / f"a.warc{packing}", data)
    found = all_of(path)
    documents = [item for item in found if isinstance(item, Document)]
    assert [(item.id, item.url) for item in documents] == [
        ("id-of-a", "a"),
        ("id-of-d", "d"),
        ("id-of-i", "i"),
    ]
    assert documents[2].text == "chunks"
    assert "Tee schmeckt überall" in documents[0].text
    assert "茶是饮料。" in documents[1].text
    date = {"date": "2026-01-02T03:04:05Z"}
    assert json.loads(documents[0].metadata or "") == date | {"title": "On tea", "charset": "cp1252"}
    places = [f"{path.name}:{sum(map(len, records[:n]))}" for n in (6, 7, 8, 9)]
    assert found[3:] == [
        Problem("not_decoded", places[0]),
        Problem("not_decoded", places[1]),
        Problem("empty", places[2]),
        Problem("not_decoded", places[3]),
    ]


def test_wet(tmp_path: Path) -> None:
    languages = "WARC-Identified-Content-Language: zho,eng\r\n"
    records = [
        record("conversion", "a", "茶 tea".encode(), languages),
        record("conversion", "b", b"\xff"),
        record("conversion", "c", b"x" * 200),
    ]
    path = write(tmp_path / "a.warc.wet.gz", b"".join(map(PACKINGS[".gz"], records)))
    metadata = '{"date": "2026-01-02T03:04:05Z", "languages": "zho,eng"}'
    assert all_of(path, config=ReadConfig(max_document_bytes=100)) == [
        Document("id-of-a", "茶 tea", "a", None, None, metadata),
        Problem("not_utf8", f"{path.name}:{len(records[0])}"),
        Problem("too_long", f"{path.name}:{sum(map(len, records[:2]))}"),
    ]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "header"])
def test_a_broken_archive_gives_nothing(tmp_path: Path, damage: str) -> None:
    data = record("conversion", "a", b"one") + record("conversion", "b", b"two" * 50)
    broken = {
        "truncated": data[:-60],
        "garbage": b"\0" * 100 + data,
        "header": data + b"WARC/1.0\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    }
    with pytest.raises(BrokenFileError, match=r".+"):
        all_of(write(tmp_path / "a.wet", broken[damage]))


def test_a_library_that_is_missing_is_named_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.html", b"x")
    files, _ = find_files(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "trafilatura", None)
    with pytest.raises(InputError, match=r"^read\.html=trafilatura: .*; pip install 'megatrain\[prep\]'$"):
        require(files, ReadConfig(html="trafilatura"))
    require(files, ReadConfig())
