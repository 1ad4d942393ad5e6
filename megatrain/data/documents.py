"""Which documents a sample is made of, and what is known of them: for people who look at what was trained on. No torch.

Design choices:
- Nothing is kept for it: where a sample lies says which members it is from, their `.lengths` which documents, and row
  group k of the shard's Parquet file, of member k, what they are.
- pyarrow is imported where a Parquet file is read: training never does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatrain.data.format import ShardSet, metadata_path
from megatrain.data.samples import Source
from megatrain.storage import one_line, root


@dataclass(frozen=True)
class Extract:
    """What a sample has of one document.

    start, stop: its places in the sample, of S + 1. first: which token of the document the one at start is.
    tokens: of the whole document, EOS included. id, url: of its metadata; None where there are none.
    shard: name of the tar. member: number in the shard. document: number in the member.
    """

    start: int
    stop: int
    first: int
    tokens: int
    id: str | None
    url: str | None
    shard: str
    member: int
    document: int


def extracts(source: Source, sample: int) -> list[Extract]:
    """What sample number `sample` of the source has, in order.

    Raises StorageError, naming the file, if it can't be read.
    """
    found: list[Extract] = []
    place = 0
    pieces = source.index.locate(np.array([sample]))
    for at, end in zip(pieces.start.tolist(), pieces.stop.tolist(), strict=True):
        while at < end:
            member = int(source.members.first_token.searchsorted(at, side="right")) - 1
            stop = min(end, int(source.members.first_token[member + 1]))
            found += _of_member(source, member, at, stop, place)
            at, place = stop, place + stop - at
    return found


def _of_member(source: Source, member: int, begin: int, end: int, place: int) -> list[Extract]:
    """Tokens [begin, end) of the set, which are of one member and stand at `place` of a sample."""
    first_token = source.members.first_token
    starts = source.reader.starts(member) + first_token[member]
    stops = np.append(starts[1:], first_token[member + 1])
    shard = int(source.members.shard[member])
    number = member - int(source.members.shard.searchsorted(shard))
    metadata = _metadata(source.shards, shard, number)
    return [
        Extract(
            start=place + max(begin, int(starts[document])) - begin,
            stop=place + min(end, int(stops[document])) - begin,
            first=max(begin - int(starts[document]), 0),
            tokens=int(stops[document] - starts[document]),
            id=metadata["id"][document] if metadata else None,
            url=metadata["url"][document] if metadata else None,
            shard=source.manifest.shards[shard].name,
            member=number,
            document=document,
        )
        for document in range(int(starts.searchsorted(begin, side="right")) - 1, int(starts.searchsorted(end)))
    ]


def _metadata(shards: ShardSet, shard: int, member: int) -> dict[str, list[str | None]] | None:
    """The ids and urls of a member's documents; None where the Parquet file, which training doesn't need, is absent."""
    import pyarrow.parquet

    folder = shards.folder if shards.tars is None else root(str(shards.tars), "path")
    path = folder / metadata_path(shards.path(shard)).name
    try:
        with one_line(path), path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read_row_group(member, columns=["id", "url"])
    except FileNotFoundError:
        return None
    columns: dict[str, list[str | None]] = table.to_pydict()
    return columns
