from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.batch import IGNORE, Batch, Sequences
from megatrain.config import ObjectiveConfig
from megatrain.errors import InputError
from megatrain.objectives import build


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    """Samples of S + 1 places with documents, padding and empty samples."""
    width = draw(st.integers(2, 12))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=5))
    document = []
    for length in lengths:
        begins = draw(st.sets(st.integers(1, width), max_size=4))
        document.append([max([0, *(b for b in begins if b <= i)]) if i < length else length for i in range(width)])
    rows = len(lengths)
    return Sequences(
        ids=torch.arange(1, rows * width + 1, dtype=torch.int32).reshape(rows, width),
        document=torch.tensor(document, dtype=torch.int32),
        length=torch.tensor(lengths, dtype=torch.int32),
        source=torch.arange(rows, dtype=torch.int32),
    )


def by_hand(sequences: Sequences, document_mask: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Targets and starts, place by place."""
    targets: list[list[int]] = []
    starts: list[list[int]] = []
    for ids, document, length in zip(
        sequences.ids.tolist(), sequences.document.tolist(), sequences.length.tolist(), strict=True
    ):
        targets.append([])
        starts.append([])
        for place in range(len(ids) - 1):
            following = place + 1
            predicted = following < length and not (document_mask and document[following] == following)
            targets[-1].append(ids[following] if predicted else IGNORE)
            starts[-1].append(length if place >= length else document[place] if document_mask else 0)
    return targets, starts


@settings(max_examples=200, deadline=None)
@given(sequences=sequences(), document_mask=st.booleans())
def test_it_is_what_a_loop_makes(sequences: Sequences, document_mask: bool) -> None:
    batch: Batch = build(ObjectiveConfig(), document_mask)(sequences)
    targets, starts = by_hand(sequences, document_mask)
    assert batch.input_ids.tolist() == [ids[:-1] for ids in sequences.ids.tolist()]
    assert batch.targets.tolist() == targets
    assert batch.start.tolist() == starts
    assert batch.positions.tolist() == [[m - start for m, start in enumerate(row)] for row in starts]
    assert batch.source is sequences.source
    assert batch.end is None
    # The mask's own rules: never decreasing, and no query without a key.
    assert (batch.start.diff(dim=1) >= 0).all()
    assert (batch.positions >= 0).all()
    for tensor in (batch.input_ids, batch.targets, batch.start, batch.positions):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


@settings(max_examples=200, deadline=None)
@given(sequences=sequences(), document_mask=st.booleans())
def test_documents_are_where_starts_change(sequences: Sequences, document_mask: bool) -> None:
    """Padding is one of them."""
    batch: Batch = build(ObjectiveConfig(), document_mask, documents=True)(sequences)
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int32
    length = batch.start.shape[1]
    columns = batch.documents.shape[1]
    most = 0
    for row, start in zip(batch.documents.tolist(), batch.start.tolist(), strict=True):
        places = sorted(set(start))
        assert row == [*places, *[length] * (columns - len(places))]
        most = max(most, len(places))
    assert columns in (length, *(2**n for n in range(5)))
    assert most <= columns < max(2 * most, 2)


def test_documents_are_made_for_who_asks() -> None:
    ids = torch.ones(1, 5, dtype=torch.int32)
    sequences = Sequences(ids, torch.zeros_like(ids), ids.sum(1).int(), ids[:, 0])
    assert build(ObjectiveConfig(), document_mask=True)(sequences).documents is None
    documents = build(ObjectiveConfig(), document_mask=True, documents=True)(sequences).documents
    assert documents is not None
    assert documents.tolist() == [[0]]


def test_an_unknown_objective_is_named() -> None:
    with pytest.raises(InputError, match=r"objective\.name=masked: must be one of causal"):
        build(ObjectiveConfig(name="masked"), document_mask=True)
