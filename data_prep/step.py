"""What a step is: cleaning, a filter, personal data, decontamination.

Design choices:
- A step takes a batch of documents and gives those that go on, in the same order; what it did is in the notes. Steps
  know nothing of files, units or workers.
"""

from __future__ import annotations

from typing import Protocol

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes


class Step(Protocol):
    """One step of preparing documents. Its result depends on the documents alone, batch by batch."""

    name: str

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        """The documents that go on, in order; what became of the others, and what was changed, is noted."""
