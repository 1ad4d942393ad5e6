"""Files to documents: what is found, where it is cut, and how bad records and broken files are told."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.read.config import ColumnsConfig
from megatrain.data_prep.read.files import File, Piece, find_files, plan
from megatrain.data_prep.read.reader import check, sample
from megatrain.data_prep.read.records import BrokenFileError, Document, Problem
from megatrain.errors import InputError
from tests.data_prep.read.reading import COLUMNS, PACKINGS, READ, all_of, of_unit, texts


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert all_of(tmp_path / "a.txt") == [Document("a.txt", "one\r\n\r\ntwo\n")]


@pytest.mark.parametrize(("suffix", "pack"), PACKINGS.items())
def test_jsonl_plain_and_packed(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    first = lines({"text": "one", "id": 7, "url": "u", "source": "s", "language": "en", "stars": 3})
    path.write_bytes(pack(first) + pack(lines({"text": "two"})))
    assert all_of(path) == [
        Document("7", "one", "u", "s", "en", '{"stars": 3}'),
        Document(f"{path.name}:{len(first)}", "two"),
    ]


def test_bad_lines_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep = b"[" * 100_000
    rows = [b'{"text": "a"}', b"{", b"\xff", b"", b'{"text": 1}', b"[]", b'{"text": " "}', deep, b'{"text": "\\ud800"}']
    path.write_bytes(b"\n".join([*rows, b'{"text": "z"}']))
    kinds = ["invalid_json", "not_utf8", "no_text", "no_text", "empty", "invalid_json", "not_utf8"]
    found = all_of(path)
    assert texts(found) == ["a", "z", *kinds]
    assert found[2] == Problem("invalid_json", "a.jsonl:14")


def test_columns_are_named_by_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"content": "one", "link": "u", "text": "other"}))
    found = all_of(tmp_path / "a.jsonl", ColumnsConfig(text="content", url="link"))
    assert found == [Document("a.jsonl:0", "one", "u", None, None, '{"text": "other"}')]


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", None, ""], "id": ["a", "b", "c"], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = all_of(tmp_path / "a.parquet")
    assert found == [
        Document("a", "one", None, None, None, '{"n": 1}'),
        Problem("no_text", "a.parquet:1"),
        Problem("empty", "a.parquet:2"),
    ]


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    binary = pa.array([b"one", b"\xff", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert texts(all_of(tmp_path / "a.parquet")) == ["one", "three", "not_utf8"]


def test_parquet_without_the_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BrokenFileError, match=r"no column 'text' .* it has body, n"):
        all_of(tmp_path / "a.parquet")


DAMAGES = ("truncated", "altered", "garbage")
BREAKABLE = (".gz", ".zst", ".bz2", ".xz", ".parquet", ".feather")


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [pair for pair in product(BREAKABLE, DAMAGES) if pair != (".feather", "altered")],  # Arrow files have no checksum
)
def test_a_broken_file_is_found_before_its_documents_are_taken(tmp_path: Path, suffix: str, damage: str) -> None:
    data = lines(*({"text": f"{n * 7919} document"} for n in range(20_000)))
    table = pa.table({"text": [f"{n * 7919} document" for n in range(20_000)]})
    path = tmp_path / (f"a{suffix}" if suffix in (".parquet", ".feather") else f"a.jsonl{suffix}")
    if suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
        data = path.read_bytes()
    elif suffix == ".feather":
        feather.write_feather(table, path)
        data = path.read_bytes()
    else:
        data = PACKINGS[suffix](data)
    middle = len(data) // 2
    path.write_bytes(
        {
            "truncated": data[:-9],
            "altered": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
            "garbage": b"not what the suffix says",
        }[damage]
    )
    with pytest.raises(BrokenFileError) as error:
        check(Piece(str(path), path.name, len(data)), READ)
    assert str(error.value)
    assert "\n" not in str(error.value)


def test_find_files_in_a_folder(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl.zst", "a.parquet", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, ignored = find_files(str(tmp_path))
    assert [file.name for file in files] == ["a.parquet", "b/1.jsonl.zst", "b/2.txt"]
    assert ignored == {".md": 1}
    assert [file.name for file in find_files(f"{tmp_path}/*/*.txt")[0]] == ["b/2.txt"]
    assert [file.name for file in find_files(f"{tmp_path}/**/*.txt")[0]] == ["b/2.txt"]
    assert [file.name for file in find_files(f"{tmp_path}/b/2.txt")[0]] == ["2.txt"]


@pytest.mark.parametrize("pattern", ["{}/none", "{}/*.txt", "{}/empty", ""])
def test_missing_input(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"input=.*: no file there with one of the suffixes \.txt, "):
        find_files(pattern.format(tmp_path))


def test_unknown_suffix_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(InputError, match=r"input=.*a\.pdf: the suffix is none of \.txt"):
        find_files(str(tmp_path / "*.pdf"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"input=.*: all 1 files there are empty"):
        find_files(str(tmp_path))
    with pytest.raises(InputError, match=r"input=a\*\*/b: Invalid pattern"):
        find_files("a**/b")


def test_small_files_share_a_unit_and_large_jsonl_is_cut(tmp_path: Path) -> None:
    for name, size in (("a.txt", 40), ("b.txt", 50), ("c.jsonl", 250), ("d.txt", 500)):
        (tmp_path / name).write_bytes(b"x" * size)
    units = plan(find_files(str(tmp_path))[0], 100)
    cut = [[(piece.name, piece.start, piece.stop) for piece in unit] for unit in units]
    assert cut == [
        [("a.txt", 0, None), ("b.txt", 0, None)],
        [("c.jsonl", 0, 100)],
        [("c.jsonl", 100, 200)],
        [("c.jsonl", 200, 250)],
        [("d.txt", 0, None)],
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40).filter(lambda text: not text.isspace())), st.integers(1, 60))
def test_cutting_a_jsonl_loses_and_repeats_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], size: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    rows = [row for row in rows if row.isprintable()] + ["last"]
    path.write_bytes(lines(*({"text": row} for row in rows)))
    units = plan([File(str(path), "a.jsonl", path.stat().st_size)], size)
    found = [item for unit in units for item in of_unit(unit)]
    assert texts(found) == rows
    assert [item.id for item in found if isinstance(item, Document)] == [
        f"a.jsonl:{position}" for position in _starts(path.read_bytes())
    ]


def _starts(data: bytes) -> list[int]:
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    return [0, *ends[:-1]]


def test_a_sample_is_from_all_over_the_input(tmp_path: Path) -> None:
    for name in range(10):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*({"text": f"{name}" * 100} for _ in range(100))))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"x")
    files = find_files(str(tmp_path))[0]
    taken = list(sample(files, COLUMNS, READ, 20_000))
    assert 190 <= len(taken) <= 210
    assert {text[0] for text in taken} == set("0123456789")
    assert taken == list(sample(files, COLUMNS, READ, 20_000))
    assert len(list(sample(files, COLUMNS, READ, 10**9))) == 1000
