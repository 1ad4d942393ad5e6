"""Web pages: .html files, and the archives of crawls: WARC, which holds what servers sent, and WET, which holds text.

Of a WARC, the HTML that was sent with status 200 is read, and `conversion` records, which are a WET's texts; other
records (requests, redirects, images) are nothing, not bad.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator

from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Piece
from megatrain.data_prep.read.html import BadPageError, extract
from megatrain.data_prep.read.records import Document, Problem, checked
from megatrain.data_prep.read.streams import open_bytes
from megatrain.data_prep.read.warc import LONGEST_HEAD, Record, message, records

HTML_TYPES = ("text/html", "application/xhtml+xml")


def read_html(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:  # noqa: ARG001
    """The file as one document."""
    with open_bytes(piece, config) as file:
        data = file.read(config.max_page_bytes + 1)
    yield _page(data, None, Document(piece.name, ""), {}, piece.name, config)


def read_warc(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:  # noqa: ARG001
    """A document a page, or a text; named by its record, which is unique in the world."""
    most = max(config.max_document_bytes, config.max_page_bytes + LONGEST_HEAD) + 1
    with open_bytes(piece, config) as file:
        for record in records(file, most):
            place = f"{piece.name}:{record.position}"
            name = record.headers.get("warc-record-id", "").removeprefix("<urn:uuid:").removesuffix(">")
            document = Document(name or place, "", url=record.headers.get("warc-target-uri"))
            match record.headers.get("warc-type"):
                case "conversion":
                    yield _text(record, document, place, config)
                case "response":
                    yield from _response(record, document, place, config)


def check_warc(piece: Piece, config: ReadConfig) -> None:
    """Reads an archive through. Raises OSError where a record's beginning or its end isn't where it should be."""
    with open_bytes(piece, config) as file:
        for _ in records(file, 0):
            pass


def _text(record: Record, document: Document, place: str, config: ReadConfig) -> Document | Problem:
    if len(record.content) > config.max_document_bytes:
        return Problem("too_long", place)
    try:
        text = record.content.decode()
    except UnicodeDecodeError:
        return Problem("not_utf8", place)
    return checked(document._replace(text=text, metadata=_json(_origin(record))), place)


def _response(record: Record, document: Document, place: str, config: ReadConfig) -> Iterator[Document | Problem]:
    try:
        status, headers, data = message(record.content, config.max_page_bytes + 1)
    except (OSError, zlib.error):
        yield Problem("not_decoded", place)
        return
    kind, _, parameters = headers.get("content-type", "").lower().partition(";")
    if status == 200 and kind.strip() in HTML_TYPES:
        charset = parameters.partition("charset=")[2].split(";")[0].strip(" \t\"'")
        yield _page(data, charset or None, document, _origin(record), place, config)


def _page(
    data: bytes, charset: str | None, document: Document, origin: dict[str, str | None], place: str, config: ReadConfig
) -> Document | Problem:
    try:
        page = extract(data, charset, config)
    except BadPageError as error:
        return Problem(str(error), place)
    metadata = _json(origin | {"title": page.title, "charset": page.charset})
    return checked(document._replace(text=page.text, metadata=metadata), place)


def _origin(record: Record) -> dict[str, str | None]:
    found = {"date": "warc-date", "languages": "warc-identified-content-language"}
    return {key: record.headers.get(name) for key, name in found.items()}


def _json(values: dict[str, str | None]) -> str | None:
    held = {key: value for key, value in values.items() if value}
    return json.dumps(held) if held else None
