"""Documents on their way from the readers to the tokenizer, many at a time.

Design choices:
- A batch of documents is an Arrow record batch of SCHEMA. It goes through a list of steps (step.py).
- What several steps need of the same texts (words, lines, their counts) is computed once and kept with the batch, until
  a step changes the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("url", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),
        ("metadata", pa.string()),
    ]
)
"""A document: id and text are never null, metadata is JSON of all else that its record held."""

Bools = npt.NDArray[np.bool_]


class Derived(Protocol):
    """What was computed of the texts of a batch."""

    def keep(self, kept: Bools) -> Any:
        """The same of the documents that are kept; bool[documents]."""


D = TypeVar("D", bound=Derived)


class Documents:
    """A batch of documents. Not to be changed in place."""

    def __init__(self, batch: pa.RecordBatch, derived: dict[Callable[..., Any], Any] | None = None) -> None:
        """batch: of SCHEMA."""
        self.batch = batch
        self._derived = derived or {}

    def __len__(self) -> int:
        return len(self.batch)

    @cached_property
    def texts(self) -> list[str]:
        """The texts as Python strings."""
        return self.column("text")

    def column(self, name: str) -> list[Any]:
        """A column as Python objects; None where null."""
        values: list[Any] = self.batch.column(name).to_pylist()
        return values

    def derive(self, make: Callable[[Documents], D]) -> D:
        """make(self), computed once for these texts."""
        if make not in self._derived:
            self._derived[make] = make(self)
        found: D = self._derived[make]
        return found

    def keep(self, kept: Bools) -> Documents:
        """Those where `kept` is true, bool[documents]; with what was derived of them."""
        if kept.all():
            return self
        return Documents(
            self.batch.filter(pa.array(kept)), {make: found.keep(kept) for make, found in self._derived.items()}
        )

    def with_texts(self, texts: Sequence[str]) -> Documents:
        """The same documents with other texts."""
        return self.with_column("text", pa.array(texts, pa.large_string()))

    def with_column(self, name: str, values: pa.Array) -> Documents:
        """The same documents with another column; a column that isn't the text leaves what was derived."""
        place = SCHEMA.get_field_index(name)
        batch = self.batch.set_column(place, SCHEMA.field(place), values)
        return Documents(batch, {} if name == "text" else self._derived)
