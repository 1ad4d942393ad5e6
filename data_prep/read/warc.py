"""The WARC format (ISO 28500), and the HTTP messages that its records hold (RFC 9112).

Design choices:
- Not FastWARC, whose 2.0.1 panics where its stream fails, which ends the process: an archive is bytes from anywhere.
  Reading one here is little beside taking the text out of its pages.
- Archives hold a message as it was sent, or decoded under the same headers: an encoding is undone where it's there.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

LONGEST_HEAD = 64 * 1024
"""Bytes of the lines before the content of a record, or of a message; a URL takes a few thousand at most."""
BUFFER = 1 << 20
CHUNK = re.compile(rb"[0-9a-fA-F]{1,8}[ \t]*(?:;[^\r\n]*)?\r\n")
PACKED = (b"\x1f\x8b", b"x\x01", b"x\x9c", b"x\xda")
"""How gzip begins, and zlib, which HTTP calls deflate."""
MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<")
Headers = dict[str, str]
"""By name in lower case."""


@dataclass(frozen=True)
class Record:
    """position: where it begins. content: no more of it than was asked for."""

    position: int
    headers: Headers
    content: bytes


def records(file: BinaryIO, most: int) -> Iterator[Record]:
    """The records of an archive with the first `most` bytes of each. Raises OSError where one isn't whole."""
    position = 0
    while begin := file.readline(LONGEST_HEAD):
        if begin.strip():
            head, size = _head(file, LONGEST_HEAD)
            length = head.get("content-length", "")
            if not begin.startswith(b"WARC/") or not length.isascii() or not length.isdecimal():
                raise OSError(f"no record begins at byte {position}")
            content = file.read(min(int(length), most))
            left = int(length) - len(content)
            while left and (data := file.read(min(left, BUFFER))):
                left -= len(data)
            if left:
                raise OSError(f"the record at byte {position} is truncated")
            yield Record(position, head, content)
            position += size + int(length)
        position += len(begin)


def message(content: bytes, most: int) -> tuple[int, Headers, bytes]:
    """The status, the headers and the first `most` bytes of an HTTP response. Raises OSError, zlib.error."""
    file = io.BytesIO(content)
    version, _, status = file.readline(LONGEST_HEAD).partition(b" ")
    if not version.startswith(b"HTTP/") or not status[:3].isdigit():
        raise OSError("no response")
    headers, _ = _head(file, LONGEST_HEAD)
    body = file.read(most)
    if headers.get("transfer-encoding", "").lower() == "chunked" and CHUNK.match(body):
        body = _without_chunks(body)
    if body.startswith(PACKED):
        body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, most)  # of either kind
    elif headers.get("content-encoding", "").lower() in ("br", "zstd") and not MARKUP.match(body):
        raise OSError("an encoding that isn't read")
    return int(status[:3]), headers, body


def _head(file: BinaryIO, longest: int) -> tuple[Headers, int]:
    """Header lines up to an empty one, and the bytes they take. A line that begins with a space continues another."""
    headers: Headers = {}
    name, size = "", 0
    while (line := file.readline(longest)).strip():
        size += len(line)
        if size > longest or not line.endswith(b"\n"):
            raise OSError(f"more than {longest} bytes of headers")
        text = line.decode("utf-8", errors="replace")
        if text[0] in " \t":
            headers[name] = f"{headers.get(name, '')} {text.strip()}"
        else:
            before, _, after = text.partition(":")
            name = before.strip().lower()
            headers[name] = after.strip()
    return headers, size + len(line)


def _without_chunks(body: bytes) -> bytes:
    """A body in chunks as one; of the last no more than there is, for a long body was cut."""
    parts, place = [], 0
    while (line := CHUNK.match(body, place)) and (size := int(line.group().split(b";")[0], 16)):
        parts.append(body[line.end() : line.end() + size])
        place = line.end() + size + len(b"\r\n")
    return b"".join(parts)
