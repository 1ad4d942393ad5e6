"""The list of steps between reading and tokenizing, in their order.

Design choices:
- One list, made of the configuration, is what every executor runs.
- Texts are cleaned before they are judged.
"""

from __future__ import annotations

from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.documents import Step


def steps(config: PrepConfig) -> list[Step]:
    """The steps that are switched on. Raises InputError naming the key of a file that can't be read."""
    return []
