"""Collects the text that every Python installation carries, as input for `megatrain prep`.

    python examples/python_text.py OUTPUT_DIR

Design choices:
- Prose comes first (pydoc topics, then what installed packages say of themselves and bring as documentation), then the
  source of the standard library; the whole is cut at LIMIT_BYTES. The same installation gives the same files.
- A text that occurs twice, such as a licence, is taken once. Tests of the standard library are left out: some
  installations carry them and some don't, and they are more than all the rest.
- The records are what `megatrain prep` reads by default: id, source, url, text; .jsonl.zst, FILE_BYTES of text a file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import zstandard

LIMIT_BYTES = 30_000_000
FILE_BYTES = 4_000_000
MIN_CHARACTERS = 200
"""A shorter text (a list of entry points, an empty __init__.py) teaches nothing."""
DOCUMENTATION = (".md", ".rst", ".txt")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
"""Folders of the standard library that aren't read; encodings are tables of numbers, pydoc_data is taken as topics."""


@dataclass(frozen=True)
class Document:
    """One record of the output."""

    id: str
    source: str
    url: str
    text: str


def topic_documents(topics: Mapping[str, str]) -> Iterator[Document]:
    """pydoc's topics: the chapters of the language reference that `help("NAME")` shows."""
    for name in sorted(topics):
        yield Document(f"topic/{name}", "pydoc topics", "https://docs.python.org/3/reference/", topics[name])


def package_documents(folders: Iterable[Path]) -> Iterator[Document]:
    """The description of each package installed in `folders`, and the documentation among its files."""
    found = {(each.name.lower(), each.version): each for each in metadata.distributions(path=[*map(str, folders)])}
    for (name, version), package in sorted(found.items()):
        url = f"pkg:pypi/{name}@{version}"
        description = package.metadata.json.get("description")
        if isinstance(description, str):
            yield Document(f"{name}/description", "packages", url, description)
        for file in sorted(package.files or [], key=str):
            text = read_text(Path(str(file.locate()))) if file.suffix in DOCUMENTATION else None
            if text is not None:
                yield Document(f"{name}/{file}", "packages", url, text)


def library_documents(folder: Path) -> Iterator[Document]:
    """The source files of the standard library in `folder`."""
    url = f"https://github.com/python/cpython/blob/v{platform.python_version()}/Lib/"
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        text = read_text(path) if LEFT_OUT.isdisjoint(name.parts) else None
        if text is not None:
            yield Document(f"library/{name.as_posix()}", "standard library", url + name.as_posix(), text)


def read_text(path: Path) -> str | None:
    """The text of a file; None where it can't be read or isn't UTF-8."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def distinct(documents: Iterable[Document], limit_bytes: int) -> Iterator[Document]:
    """The documents that are long enough and whose text wasn't there before, up to `limit_bytes` of text."""
    seen: set[bytes] = set()
    for document in documents:
        try:
            data = document.text.encode()
        except UnicodeEncodeError:  # a package's description that isn't UTF-8
            continue
        digest = hashlib.sha256(data).digest()
        if len(document.text) < MIN_CHARACTERS or digest in seen:
            continue
        seen.add(digest)
        limit_bytes -= len(data)
        if limit_bytes < 0:
            return
        yield document


def in_files(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about FILE_BYTES of text."""
    held: list[Document] = []
    for document in documents:
        held.append(document)
        if sum(len(each.text) for each in held) >= FILE_BYTES:
            yield held
            held = []
    if held:
        yield held


def write(documents: Iterable[Document], output: Path) -> dict[str, tuple[int, int]]:
    """Writes output/text-NNNN.jsonl.zst; documents and characters of each source."""
    output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, tuple[int, int]] = {}
    for number, held in enumerate(in_files(documents)):
        lines = "".join(json.dumps(asdict(document)) + "\n" for document in held)
        (output / f"text-{number:04}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        for document in held:
            count, characters = counts.get(document.source, (0, 0))
            counts[document.source] = (count + 1, characters + len(document.text))
    return counts


def installed() -> Iterator[Document]:
    """All that this installation carries."""
    paths = sysconfig.get_paths()
    yield from topic_documents(importlib.import_module("pydoc_data.topics").topics)
    yield from package_documents(dict.fromkeys([Path(paths["purelib"]), Path(paths["platlib"])]))
    yield from library_documents(Path(paths["stdlib"]))


def main() -> int:
    """The command line."""
    if len(sys.argv) != 2:
        print(__doc__.splitlines()[2].strip(), file=sys.stderr)
        return 2
    for source, (documents, characters) in write(distinct(installed(), LIMIT_BYTES), Path(sys.argv[1])).items():
        print(f"{source}: {documents:,} documents, {characters / 1e6:.1f} million characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
