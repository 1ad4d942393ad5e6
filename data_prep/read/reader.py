"""Units of the input to documents.

Design choices:
- A file that can't be read to its end gives nothing: `check` reads a piece through before its documents are taken, so
  a repaired file can be prepared later without repeating any. That costs a few percent of tokenizing.
- A bad record is a Problem that is told, not an exception; the rest of the file goes on. A store that can't be reached
  is an exception: that is nothing about the file.
- Text is what comes out, whatever the format: HTML is taken apart here, so that no step and no sample ever sees markup.
- Memory is bounded by the longest record allowed, or by a batch of a table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import pyarrow as pa
import xxhash

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.read import html
from megatrain.data_prep.read.columnar import open_batches, read_columnar
from megatrain.data_prep.read.config import ColumnsConfig, ReadConfig
from megatrain.data_prep.read.delimited import read_delimited
from megatrain.data_prep.read.files import COLUMNAR, HTML, JSON_LINES, WARC, Files, Piece, Unit, plan, suffix_of
from megatrain.data_prep.read.records import BrokenFileError, Document, Found, Problem, batches
from megatrain.data_prep.read.streams import BUFFER, local, open_bytes
from megatrain.data_prep.read.text import read_json_lines, read_txt
from megatrain.data_prep.read.web import check_warc, read_html, read_warc
from megatrain.storage import StorageError

BATCH_BYTES = 4 * 1024 * 1024
"""Text of a batch of documents, about."""
SPREAD = 64
"""Units that a sample is taken from in turn."""
MOST_SAMPLED = 1 << 16
"""About how many units the input is cut into for a sample, at most."""

READERS: dict[str, Callable[[Piece, ColumnsConfig, ReadConfig], Iterator[Found]]] = {
    ".txt": read_txt,
    **dict.fromkeys(JSON_LINES, read_json_lines),
    **dict.fromkeys((".csv", ".tsv"), read_delimited),
    **dict.fromkeys(HTML, read_html),
    **dict.fromkeys(WARC, read_warc),
    **dict.fromkeys(COLUMNAR, read_columnar),
}
"""By suffix. A reader raises BrokenFileError only before it gives anything."""


def require(files: Files, config: ReadConfig) -> None:
    """Raises InputError if a library that these files need isn't installed."""
    if any(suffix_of(file.path)[0] in (*HTML, *WARC) for file in files):
        html.load(config)


def read_unit(
    unit: Unit,
    columns: ColumnsConfig,
    config: ReadConfig,
    on_problem: Callable[[str, Problem], None],
    on_broken: Callable[[str, str], None],
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[Documents]:
    """The documents of a unit, in order, in batches of about `batch_bytes` of text (or one document of more).

    on_problem: told the file's name and each bad record. on_broken: told the name of a file that gives nothing, and
    why. Raises StorageError where a store can't be reached.
    """
    found = _found(unit, columns, config, on_problem, on_broken)
    yield from batches(found, batch_bytes)


def sample(files: Files, columns: ColumnsConfig, config: ReadConfig, limit: int) -> Iterator[str]:
    """Texts of about `limit` bytes from all over the input, always the same ones; problems are passed over.

    The input is cut finer than for work. The units are visited in hashed order, SPREAD of them in turn, each for a
    small share of `limit`. Files aren't checked first, so a broken one may give what comes before its break.
    """
    turn = max(limit // (2 * SPREAD), 1)
    units = plan(files, max(turn, sum(file.size for file in files) // MOST_SAMPLED))
    waiting = iter(sorted(units, key=lambda unit: xxhash.xxh3_64_intdigest(f"{unit[0].name}:{unit[0].start}".encode())))
    reading = deque(_sampled(unit, columns, config, turn) for unit in islice(waiting, SPREAD))
    while reading and limit > 0:
        texts, taken = reading.popleft(), 0
        for text in texts:
            yield text
            taken += len(text.encode())
            if taken >= turn:
                reading.append(texts)
                break
        else:
            reading.extend(_sampled(unit, columns, config, turn) for unit in islice(waiting, 1))
        limit -= taken


def _sampled(unit: Unit, columns: ColumnsConfig, config: ReadConfig, turn: int) -> Iterator[str]:
    def pass_over(*_: object) -> None:
        """What is bad is told when its unit is prepared."""

    for piece in unit:
        try:
            for documents in batches(_found((piece,), columns, config, pass_over, pass_over, turn), turn):
                yield from documents.texts
        except StorageError:  # else the sample would be of what could be reached
            raise
        except (OSError, EOFError, pa.ArrowException):
            continue


def _found(
    unit: Unit,
    columns: ColumnsConfig,
    config: ReadConfig,
    on_problem: Callable[[str, Problem], None],
    on_broken: Callable[[str, str], None],
    sampled: int | None = None,
) -> Iterator[Document | pa.RecordBatch]:
    """What is good in a unit. sampled: about the bytes wanted of each file, which isn't checked then."""
    for piece in unit:
        try:
            with local(piece, config, sampled) as here:
                if sampled is None:
                    check(here, config)
                for found in READERS[suffix_of(piece.path)[0]](here, columns, config):
                    if isinstance(found, Problem):
                        on_problem(piece.name, found)
                    else:
                        yield found
        except BrokenFileError as error:
            on_broken(piece.name, str(error))


def check(piece: Piece, config: ReadConfig) -> None:
    """Reads a local piece through. Raises BrokenFileError if its bytes can't be had or don't decompress."""
    try:
        if piece.path.endswith(COLUMNAR):
            for _ in open_batches(piece, config):
                pass
            return
        if suffix_of(piece.path)[0] in WARC:
            check_warc(piece, config)
            return
        with open_bytes(piece, config) as file:
            if piece.start:
                file.seek(piece.start)
            while file.read(BUFFER) and (piece.stop is None or file.tell() < piece.stop):
                pass
    except (OSError, EOFError, pa.ArrowException) as error:
        raise BrokenFileError(" ".join(str(error).split())) from error
