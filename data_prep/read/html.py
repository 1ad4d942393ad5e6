"""HTML to text, without menus, footers and other boilerplate.

Design choices:
- Bytes are decoded by the charset that the server or the page declares, else by a guess; what doesn't decode becomes
  U+FFFD, as in a browser.
- A page is refused where it is a bomb: where it is nested deeper than browsers go, for the time of extraction grows
  with the square of the depth; and where formatting that is never closed would be repeated in each of many blocks,
  which is what the standard (HTML, section 13.2.4.3) has a parser do: 40 kB of it become 1.5 GB.
- trafilatura's own deduplication isn't used: what it drops depends on the pages before.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from typing import NamedTuple

from megatrain.data_prep.read.config import ReadConfig
from megatrain.errors import bad_value

DEEPEST = 512
"""Elements in each other, of a page that is read: as deep as Chromium goes."""
TOO_DEEP = " > ".join("*" * (DEEPEST + 1))
"""A selector of what lies deeper; it costs a hundredth of parsing."""
MOST_NODES = 2_000_000
"""What formatting may be repeated to; a node takes about 350 bytes."""
FORMATTING = re.compile(r"<(?:b|big|code|em|font|i|s|small|strike|strong|tt|u)(?=[\s/>])[^>]*", re.IGNORECASE)
"""What is repeated in the next block unless it is closed; of links at most one is."""
REPEATED = 3
"""Of tags that are alike, the most that are repeated."""


class Page(NamedTuple):
    """What is kept of a page. charset: by which it was decoded."""

    text: str
    title: str
    charset: str


class BadPageError(Exception):
    """Says the kind of problem that a page has."""


def load(config: ReadConfig) -> None:
    """Imports what reads web pages. Raises InputError if it isn't installed."""
    try:
        for module in ("resiliparse.extract.html2text", config.html):
            importlib.import_module(module)
    except ImportError as error:
        raise bad_value("read.html", config.html, f"{error}; pip install 'megatrain[prep]'") from None


def extract(data: bytes, charset: str | None, config: ReadConfig) -> Page:
    """A page's main text and its title. charset: what the server declares. Raises BadPageError."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
    from resiliparse.parse.html import HTMLTree

    if len(data) > config.max_page_bytes:
        raise BadPageError("too_long")
    known = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    encoding = known or detect_encoding(data, from_html_meta=True) or "utf-8"
    html = data.decode(encoding, errors="replace").removeprefix("\ufeff")
    if _repeats(html):
        raise BadPageError("nested")
    tree = HTMLTree.parse(html)
    if tree.document is None or tree.document.query_selector(TOO_DEEP) is not None:
        raise BadPageError("nested")
    title = " ".join((tree.title or "").split())
    if config.html == "trafilatura":
        import trafilatura

        return Page(trafilatura.extract(html, favor_precision=True, include_comments=False) or "", title, encoding)
    from resiliparse.extract.html2text import extract_plain_text

    return Page(extract_plain_text(tree, main_content=True, alt_texts=False), title, encoding)


def _repeats(html: str) -> bool:
    """Whether parsing might make more than MOST_NODES elements of formatting that isn't closed."""
    repeated = sum(min(count, REPEATED) for count in Counter(FORMATTING.findall(html)).values())
    return repeated * html.count("<") > MOST_NODES
