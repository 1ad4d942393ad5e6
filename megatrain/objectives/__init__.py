"""What is predicted: functions that make inputs and targets (batch.Batch) of stored samples (batch.Sequences)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatrain.config import ObjectiveConfig
from megatrain.errors import bad_value

if TYPE_CHECKING:
    from megatrain.batch import Batch, Sequences

NAMES = ("causal",)


def check(config: ObjectiveConfig) -> None:
    """Raises InputError if there is no objective of that name."""
    if config.name not in NAMES:
        raise bad_value("objective.name", config.name, f"must be one of {', '.join(NAMES)}")


def build(config: ObjectiveConfig, document_mask: bool, documents: bool = False) -> Callable[[Sequences], Batch]:
    """The objective that is configured. Raises InputError if there is none of that name.

    documents: whether attention needs Batch.documents.
    """
    from megatrain.objectives.causal import Causal

    check(config)
    return Causal(document_mask, documents)
