"""What the readers are told: which columns hold what, and how much a record may be."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.errors import bad_value

EXTRACTORS = ("resiliparse", "trafilatura")


@dataclass
class ColumnsConfig:
    """Which keys of a JSON record, or columns of a table, hold what. All others become the metadata."""

    text: str = "text"
    """The document."""
    id: str = "id"
    """Its name. A record without one gets FILE:BYTE (of a table: FILE:ROW), where it begins."""
    url: str = "url"
    """Where it is from."""
    source: str = "source"
    """The collection that it belongs to."""
    language: str = "language"
    """Its language."""


@dataclass
class ReadConfig:
    """How files are read."""

    max_document_bytes: int = 16 * 1024 * 1024
    """Largest record (a line of JSON, a .txt file, a web page) that is read; a longer one is a bad record, and is
    passed over without being held in memory."""
    max_page_bytes: int = 3 * 1024 * 1024
    """Largest HTML page. Parsing may take 150 times as much memory; Common Crawl cuts pages at 5 MiB."""
    max_expansion: int = 100
    """A packed file that grows more than this many times, and above 64 MiB, is broken: text doesn't, bombs do."""
    html: str = "resiliparse"
    """What takes the text out of HTML, without menus and footers: resiliparse or trafilatura."""


def check(config: ReadConfig) -> None:
    """Raises InputError for a value that can't be had."""
    for key in ("max_document_bytes", "max_page_bytes", "max_expansion"):
        value = getattr(config, key)
        if value < 1:
            raise bad_value(f"read.{key}", value, "at least 1")
    if config.html not in EXTRACTORS:
        raise bad_value("read.html", config.html, f"one of {', '.join(EXTRACTORS)}")
