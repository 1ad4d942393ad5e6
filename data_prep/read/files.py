"""The files of the input, on a file system or in an object store, and how they are cut into units of work.

Design choices:
- The input is a list of units, known before work starts: files in sorted order, small ones together, large plain JSON
  lines cut at lines. Units are what workers take, and their order is the order of the output. Nothing else is cut: a
  quoted field of .csv may hold line breaks, and the rest has no place to begin at.
- Sizes come with the listing: a store isn't asked for each file.
- What a file is, its suffix says, never its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from megatrain.errors import bad_value
from megatrain.storage import URL, one_line, root

if TYPE_CHECKING:
    from upath import UPath

JSON_LINES = (".jsonl", ".ndjson", ".json")
HTML = (".html", ".htm")
WARC = (".warc", ".wet")
ROWS = (".txt", *JSON_LINES, ".csv", ".tsv", *HTML, *WARC)
"""Formats that may be packed."""
PACKED = (".gz", ".zst", ".bz2", ".xz")
COLUMNAR = (".parquet", ".arrow", ".feather", ".arrows")
"""Formats with a compression of their own."""
SUFFIXES = (*ROWS, *(row + packed for row in ROWS for packed in PACKED), *COLUMNAR)
LEGAL = f"{', '.join((*ROWS, *COLUMNAR))}, the first {len(ROWS)} also with {', '.join(PACKED)}"

SIGNS = "*?["
"""Of a glob."""


class File(NamedTuple):
    """path: or URL. name: the path below the input's folder, what people see. size: bytes.

    version: what changes when the file does: its time in nanoseconds, or what its store has for that.
    """

    path: str
    name: str
    size: int
    version: str = ""


Files = list[File]
Info = dict[str, Any]
"""What fsspec says of a file."""


@dataclass(frozen=True)
class Piece:
    """What of a file is read: the lines that begin in [start, stop), in bytes, of plain JSON lines; else all of it.

    path, name, version: the file's. size: bytes of the file that this accounts for.
    """

    path: str
    name: str
    size: int
    start: int = 0
    stop: int | None = None
    version: str = ""


Unit = tuple[Piece, ...]


def suffix_of(path: str) -> tuple[str, str]:
    """What a file is: a suffix of ROWS and one of PACKED or "", or one of COLUMNAR and ""."""
    packed = next((packed for packed in PACKED if path.endswith(packed)), "")
    return PurePosixPath(path.removesuffix(packed)).suffix, packed


def find_files(pattern: str) -> tuple[Files, Counter[str]]:
    """The files of `input` with their names, in sorted order, and how many of its folders' were ignored, by suffix.

    pattern: a file, a folder with all below it, or a glob, on a file system or as a URL.
    Raises InputError if there is nothing, if all files are empty, or if one that was asked for has an unknown suffix;
    StorageError where a store can't be reached.
    """
    files, ignored = _in_store(pattern) if URL.match(pattern) else _on_disk(pattern)
    if not files:
        raise bad_value("input", pattern, f"no file there with one of the suffixes {LEGAL}")
    if not any(file.size for file in files):
        raise bad_value("input", pattern, f"all {len(files)} files there are empty")
    return sorted(files), ignored


def _on_disk(pattern: str) -> tuple[Files, Counter[str]]:
    path = Path(pattern).absolute()
    if pattern and path.exists():
        folder, matches = (path if path.is_dir() else path.parent), [path]
    else:
        below = _fixed(pattern)
        folder = Path(pattern[:below]).absolute()
        try:
            matches = list(folder.glob(pattern[below:])) if pattern[below:] else []
        except ValueError as error:
            raise bad_value("input", pattern, str(error)) from None
    chosen = {match for match in matches if not match.is_dir()}
    inside = {file for match in matches if match.is_dir() for file in match.rglob("*") if file.is_file()}
    known, ignored = _known(map(str, chosen), map(str, inside - chosen))
    return [_file(Path(name), folder) for name in known], ignored


def _file(path: Path, folder: Path) -> File:
    found = path.stat()
    return File(str(path), path.relative_to(folder).as_posix(), found.st_size, str(found.st_mtime_ns))


def _in_store(pattern: str) -> tuple[Files, Counter[str]]:
    path = root(pattern, "input")
    if path.protocol in ("file", "local"):
        return _on_disk(path.path)
    folder, chosen, inside = _listed(path)
    known, ignored = _known(chosen, inside.keys() - chosen.keys())
    infos = inside | chosen
    if any(infos[name]["size"] is None for name in known):
        raise bad_value("input", pattern, "the server doesn't say how large it is")
    files = [File(_url(path, name), name[folder:], infos[name]["size"], _version(infos[name])) for name in known]
    return files, ignored


def _listed(path: UPath) -> tuple[int, dict[str, Info], dict[str, Info]]:
    """The length of the folder's name; what fsspec says of the files that match by name, and of those in folders."""
    matches: dict[str, Info] = {}
    inside: dict[str, Info] = {}
    folder = _fixed(path.path)
    with one_line(path), suppress(FileNotFoundError):
        if any(sign in path.path for sign in SIGNS):
            matches = path.fs.glob(path.path, detail=True)
        else:
            matches = {path.path: path.fs.info(path.path)}
            folder = folder if matches[path.path]["type"] == "file" else len(path.path.rstrip("/")) + 1
        for name in [name for name, info in matches.items() if info["type"] != "file"]:
            del matches[name]
            inside.update(path.fs.find(name, detail=True))
    return folder, matches, inside


def _version(info: Info) -> str:
    """Stores have different names for it."""
    return str(next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), ""))


def _url(path: UPath, name: str) -> str:
    """What fsspec calls a file, as a URL."""
    return name if name.startswith(f"{path.protocol}://") else f"{path.protocol}://{name.lstrip('/')}"


def _fixed(pattern: str) -> int:
    """How much of a glob is a folder: up to the last slash before its first sign."""
    first = min((pattern.index(sign) for sign in SIGNS if sign in pattern), default=len(pattern))
    return pattern.rfind("/", 0, first) + 1


def _known(chosen: Iterable[str], inside: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """The files to read: all that were chosen by name, and of those inside folders the ones with a known suffix."""
    known: list[str] = []
    others: list[str] = []
    for name in chosen:
        if not name.endswith(SUFFIXES):
            raise bad_value("input", name, f"the suffix is none of {LEGAL}")
        known.append(name)
    for name in inside:
        (known if name.endswith(SUFFIXES) else others).append(name)
    return known, Counter(PurePosixPath(name).suffix for name in others)


def _pieces(file: File, unit_bytes: int) -> Iterator[Piece]:
    if file.path.endswith(JSON_LINES) and file.size:
        for start in range(0, file.size, unit_bytes):
            stop = min(start + unit_bytes, file.size)
            yield Piece(file.path, file.name, stop - start, start, stop, file.version)
    else:
        yield Piece(file.path, file.name, file.size, version=file.version)


def plan(files: Files, unit_bytes: int) -> list[Unit]:
    """Cuts the input into units of about `unit_bytes`, in order."""
    units: list[Unit] = []
    pieces: list[Piece] = []
    filled = 0
    for file in files:
        for piece in _pieces(file, unit_bytes):
            if pieces and filled + piece.size > unit_bytes:
                units.append(tuple(pieces))
                pieces, filled = [], 0
            pieces.append(piece)
            filled += piece.size
    units.append(tuple(pieces))
    return units
