"""Web pages: .html files, and the archives of crawls: WARC, which holds what servers sent, and WET, which holds text.

Design choices:
- Of a WARC, the HTML that was sent with status 200 is read, and `conversion` records, which are a WET's texts; other
  records (requests, redirects, images) are nothing, not bad.
- The archive is unpacked as all packed files are, so bombs and truncation are found in one place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.files import Piece
from megatrain.data_prep.read.html import BadPageError, extract
from megatrain.data_prep.read.records import Document, Problem, checked
from megatrain.data_prep.read.streams import BUFFER, open_bytes

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord

HTML_TYPES = ("text/html", "application/xhtml+xml")


def read_html(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:  # noqa: ARG001
    """The file as one document."""
    with open_bytes(piece, config) as file:
        data = file.read(config.max_page_bytes + 1)
    yield _page(data, None, Document(piece.name, ""), {}, piece.name, config)


def read_warc(piece: Piece, columns: ColumnsConfig, config: ReadConfig) -> Iterator[Document | Problem]:  # noqa: ARG001
    """A document a page, or a text; named by its record, which is unique in the world."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.conversion
    with open_bytes(piece, config) as file:
        for record in ArchiveIterator(file, wanted, parse_http=False, stream_detect=False):
            if (found := _record(record, f"{piece.name}:{record.stream_pos}", config)) is not None:
                yield found


def check_warc(piece: Piece, config: ReadConfig) -> None:
    """Reads an archive through. Raises OSError where a record's beginning or its end isn't where it should be."""
    from fastwarc.warc import ArchiveIterator

    with open_bytes(piece, config) as file:
        for record in ArchiveIterator(file, parse_http=False, stream_detect=False):
            left = record.content_length
            while data := record.reader.read(BUFFER):
                left -= len(data)
            if left:
                raise OSError(f"the record at {record.stream_pos} is truncated")


def _record(record: WarcRecord, place: str, config: ReadConfig) -> Document | Problem | None:
    from fastwarc.warc import WarcRecordType

    name = (record.record_id or "").removeprefix("<urn:uuid:").removesuffix(">") or place
    document = Document(name, "", url=record.headers.get("WARC-Target-URI"))
    others = {
        "date": record.headers.get("WARC-Date"),
        "languages": record.headers.get("WARC-Identified-Content-Language"),
    }
    try:
        if record.record_type == WarcRecordType.response:
            record.parse_http(auto_decode="all")
            sent = record.is_http_parsed and record.http_headers.status_code == 200
            if not sent or record.http_content_type not in HTML_TYPES:
                return None
            data = record.reader.read(config.max_page_bytes + 1)
            return _page(data, record.http_charset, document, others, place, config)
        data = record.reader.read(config.max_document_bytes + 1)
    except OSError:
        return Problem("not_decoded", place)
    if len(data) > config.max_document_bytes:
        return Problem("too_long", place)
    try:
        return checked(document._replace(text=data.decode(), metadata=_json(others)), place)
    except UnicodeDecodeError:
        return Problem("not_utf8", place)


def _page(
    data: bytes, charset: str | None, document: Document, others: dict[str, str | None], place: str, config: ReadConfig
) -> Document | Problem:
    try:
        page = extract(data, charset, config)
    except BadPageError as error:
        return Problem(str(error), place)
    metadata = _json(others | {"title": page.title, "charset": page.charset})
    return checked(document._replace(text=page.text, metadata=metadata), place)


def _json(values: dict[str, str | None]) -> str | None:
    held = {key: value for key, value in values.items() if value}
    return json.dumps(held) if held else None
