"""Causal language modelling: position i predicts id i + 1.

Design choices:
- With document_mask attention stays within a document, positions start again with each, and the first id of a document
  is not predicted, for nothing that says what it could be is seen. Without it, a sample is one text.
- Padding is a document of its own in either case, so no query is without a key and none sees across.
"""

from __future__ import annotations

import torch

from megatrain.batch import IGNORE, Batch, Sequences, document_starts


class Causal:
    """Sequences to Batch, on the CPU. documents: whether Batch.documents is made."""

    def __init__(self, document_mask: bool, documents: bool = False) -> None:
        self.document_mask = document_mask
        self.documents = documents

    def __call__(self, sequences: Sequences) -> Batch:
        """int32[B, S + 1] ids and documents to inputs and targets int32[B, S]. `end` is None."""
        place = torch.arange(sequences.ids.shape[1], dtype=torch.int32)
        length = sequences.length[:, None]
        padding = place >= length
        if self.document_mask:
            document = sequences.document
            unpredicted = padding | (document == place)
        else:
            document = torch.where(padding, length, 0)
            unpredicted = padding
        start = document[:, :-1].contiguous()
        return Batch(
            input_ids=sequences.ids[:, :-1].contiguous(),
            targets=torch.where(unpredicted[:, 1:], IGNORE, sequences.ids[:, 1:]),
            positions=place[:-1] - start,
            start=start,
            end=None,
            source=sequences.source,
            documents=document_starts(start) if self.documents else None,
        )
