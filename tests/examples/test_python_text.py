from __future__ import annotations

import io
import json
from pathlib import Path

import zstandard

from examples.python_text import (
    Document,
    distinct,
    library_documents,
    package_documents,
    read_text,
    topic_documents,
    write,
)

LONG = "x" * 300


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def prefix(folder: Path) -> tuple[Path, Path]:
    """A small installation: its standard library and its site-packages."""
    library = folder / "lib/python3"
    site = library / "site-packages"
    put(library / "b.py", "b" + LONG)
    put(library / "asyncio/a.py", "a" + LONG)
    put(library / "latin.py", b"\xe9" * 300)
    put(library / "empty.py", "")
    put(library / "test/test_a.py", "t" + LONG)
    put(site / "pkg/module.py", "m" + LONG)
    put(site / "pkg/README.md", "r" + LONG)
    put(site / "pkg/LICENSE.txt", "licence" + LONG)
    put(site / "pkg-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: Pkg\nVersion: 1.0\n\nd{LONG}\n")
    put(
        site / "pkg-1.0.dist-info/RECORD",
        "pkg/module.py,,\npkg/README.md,,\npkg/LICENSE.txt,,\npkg/gone.md,,\npkg-1.0.dist-info/METADATA,,\n",
    )
    put(site / "other-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    put(site / "other-2.0.dist-info/RECORD", "other/LICENSE.txt,,\n")
    put(site / "other/LICENSE.txt", "licence" + LONG)
    return library, site


def test_an_installation_gives_its_distinct_texts_in_a_fixed_order(tmp_path: Path) -> None:
    library, site = prefix(tmp_path)
    documents = [
        *topic_documents({"with": "w" + LONG, "and": "too short"}),
        *package_documents([site, site]),
        *library_documents(library),
    ]
    kept = list(distinct(documents, 1_000_000))
    assert [(document.id, document.source) for document in kept] == [
        ("topic/with", "pydoc topics"),
        ("other/other/LICENSE.txt", "packages"),
        ("pkg/description", "packages"),
        ("pkg/pkg/README.md", "packages"),
        ("library/asyncio/a.py", "standard library"),
        ("library/b.py", "standard library"),
    ]
    assert kept[2].text.strip() == "d" + LONG
    assert kept[2].url == "pkg:pypi/pkg@1.0"
    assert kept[4].url.endswith("/Lib/asyncio/a.py")


def test_the_text_is_cut_at_the_limit_and_what_is_not_utf_8_is_left_out(tmp_path: Path) -> None:
    texts = ["a" * 300, "\ud800" + "b" * 300, "a" * 300, "é" * 200, "c" * 300]
    documents = [Document(str(number), "s", "u", text) for number, text in enumerate(texts)]
    assert [document.id for document in distinct(documents, 700)] == ["0", "3"]
    put(tmp_path / "latin", b"\xe9")
    assert read_text(tmp_path / "latin") is None


def test_the_files_hold_the_records_and_are_the_same_each_time(tmp_path: Path) -> None:
    documents = [Document(str(number), "s", "u", f"{number}\u00e9\n" * 1_000_000) for number in range(4)]
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert write(documents, folder) == {"s": (4, 12_000_000)}
    names = [f"text-{number:04}.jsonl.zst" for number in range(2)]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    read: list[dict[str, str]] = []
    for name in names:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
            read += [json.loads(line) for line in io.TextIOWrapper(reader)]
    assert [Document(**record) for record in read] == documents
