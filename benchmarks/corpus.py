"""Real text for the benchmarks, from the documentation packages of Debian: `python -m benchmarks.corpus --output DIR`.

    DIR/packages/*.deb          what apt-get downloaded
    DIR/raw/PACKAGE/...         its pages as the files they are: HTML, manual pages, plain text, many of them gzipped
    DIR/text/PACKAGE.parquet    their text: id, text, source (the package), language, url

Design choices:
- apt-get fetches, and checks each package against the distribution's signed index. Nothing is installed: dpkg only
  unpacks.
- What there is already isn't made again, and what is there is whole: each step ends in a rename. So a second start does
  what the first one didn't.
- Several languages, scripts without spaces among them. Some manuals come twice, as HTML and as its source: real
  near-duplicates.
- The text form is plain: main content of HTML, manual pages without their macros, all else as it is.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from megatrain.errors import BUG, DONE

LIBREOFFICE = ("de", "es", "fr", "hi", "it", "ja", "ko", "nl", "pl", "pt-br", "ru", "tr", "zh-cn", "zh-tw")
PACKAGES = (
    "anarchism",
    "debian-handbook",
    "debian-policy",
    "debian-reference-de",
    "debian-reference-ja",
    "debian-reference-zh-cn",
    "gnome-user-docs",
    *(f"libreoffice-help-{language}" for language in LIBREOFFICE),
    "linux-doc-6.1",
    "manpages-de",
    "manpages-fr",
    "manpages-ja",
    "manpages-zh",
    "openjdk-17-doc",
    "perl-doc",
    "postgresql-doc-15",
    "python3.11-doc",
    "rust-doc",
)
"""Of Debian 12."""
HTML = (".html", ".htm", ".xhtml", ".page")
PLAIN = (".txt", ".rst", ".pod", ".md")
LEAST_CHARACTERS = 200
"""A page with less text is no document."""
ROWS = 1000
"""Of a row group."""

Page = dict[str, str]


def fetch(package: str, folder: Path) -> Path:
    """The .deb of a package, in `folder`. Raises CalledProcessError if apt-get doesn't get it."""
    if not (found := sorted(folder.glob(f"{package}_*.deb"))):
        command = ["apt-get", "download", "--quiet=2", "-o", "APT::Sandbox::User=root", package]
        subprocess.run(command, cwd=folder, check=True)
        found = sorted(folder.glob(f"{package}_*.deb"))
    return found[-1]


def unpack(package: Path, folder: Path) -> None:
    """The pages of a .deb, as files in `folder`, which is there when all of them are."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        everything, pages = Path(name) / "everything", Path(name) / "pages"
        subprocess.run(["dpkg", "-x", package, everything], check=True)
        for path in everything.rglob("*"):
            if path.is_file() and not path.is_symlink() and kind(path):
                target = pages / path.relative_to(everything)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
        pages.rename(folder)


def kind(path: Path) -> str | None:
    """`html`, `manual` or `plain`; None for what holds no text for people."""
    name = path.name.removesuffix(".gz")
    if name.endswith(HTML):
        return "html"
    if "man" in path.parts and path.suffix == ".gz":
        return "manual"
    return "plain" if name.endswith(PLAIN) else None


def write_text(folder: Path, output: Path) -> None:
    """The text of all pages of an unpacked package, in the order of their paths, to a Parquet file."""
    if output.exists():
        return
    schema = pa.schema([(name, pa.large_string()) for name in ("id", "text", "source", "language", "url")])
    unfinished = output.with_suffix(".unfinished")
    with pq.ParquetWriter(unfinished, schema, compression="zstd") as file:
        file.write_table(pa.Table.from_pylist(list(pages(folder)), schema), row_group_size=ROWS)
    unfinished.rename(output)


def pages(folder: Path) -> Iterator[Page]:
    """The pages of an unpacked package that have text."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = path.relative_to(folder).as_posix()
        text = page_text(path)
        if len(text) >= LEAST_CHARACTERS:
            yield {
                "id": f"{folder.name}/{place}",
                "text": text,
                "source": folder.name,
                "language": language(folder.name, place),
                "url": f"file:///{place}",
            }


def page_text(path: Path) -> str:
    """What people read of a page."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode(errors="replace")
    match kind(path):
        case "html":
            from resiliparse.extract.html2text import extract_plain_text

            text = extract_plain_text(text, main_content=True)
        case "manual":
            text = re.sub(r"(?m)^[.'](?:\\\".*|[A-Za-z]+ ?)", "", text)  # comments, and the names of macros
            text = re.sub(r"\\(?:f(?:\w|\(..|\[.*?\])|[&%/,]|s[-+]?\d+)", "", text)  # fonts and sizes
            text = re.sub(r"\\-", "-", text)
    return text.strip()


def language(package: str, place: str) -> str:
    """The ISO 639-1 code that a package's name ends with, or that the path of a page holds; else English."""
    named = re.search(r"-(de|es|fr|hi|it|ja|ko|nl|pl|pt|ru|tr|zh)(?:-[a-z]{2})?$", package)
    found = named or re.search(r"/(?:(?:help|man|translations)/(?=..[/_@])|html/(?=..-))([a-z]{2})", place)
    return found[1] if found else "en"


def summary(texts: list[Path]) -> Table:
    """A row a package, and the sum."""
    table = Table("package", "languages", "documents", "MB of text")
    total = 0.0
    for path in texts:
        content = pq.read_table(path, columns=["language", "text"])
        languages = sorted(pc.unique(content["language"]).to_pylist())
        megabytes = (pc.sum(pc.binary_length(content["text"])).as_py() or 0) / 1e6
        total += megabytes
        table.add_row(path.stem, " ".join(languages), f"{len(content):,}", f"{megabytes:.1f}")
    table.add_row("all", "", "", f"{total:.1f}")
    return table


def main(argv: list[str] | None = None) -> int:
    """Makes the corpus. The exit code."""
    parser = argparse.ArgumentParser(description="Real text, from Debian's documentation packages")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to put it")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME", help="instead of the usual ones")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    for name in ("packages", "raw", "text"):
        (output / name).mkdir(parents=True, exist_ok=True)
    folders = [output / "raw" / package for package in arguments.packages]
    texts = [output / "text" / f"{package}.parquet" for package in arguments.packages]
    try:
        archives = [fetch(package, output / "packages") for package in arguments.packages]
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"{error}\nThis needs apt-get and the package lists of Debian 12 (apt-get update).", file=sys.stderr)
        return BUG
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(unpack, archives, folders))
        list(pool.map(write_text, folders, texts))
    Console(highlight=False).print(summary(texts))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
