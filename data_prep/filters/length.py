"""Documents that are too short or too long."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import LengthConfig
from megatrain.data_prep.filters.rules import Rules
from megatrain.data_prep.filters.words import words_of
from megatrain.data_prep.notes import Notes


class Length:
    """A step; see LengthConfig."""

    name = "length"

    def __init__(self, config: LengthConfig) -> None:
        self.config = config

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        config = self.config
        rules = Rules(documents)
        characters = np.asarray(pc.utf8_length(documents.batch.column("text")))
        rules.at_least("min_characters", characters, config.min_characters)
        if config.max_characters is not None:
            rules.at_most("max_characters", characters, config.max_characters)
        if config.min_words > 0:
            rules.at_least("min_words", documents.derive(words_of).rows.counts, config.min_words)
        if config.max_words is not None:
            rules.at_most("max_words", documents.derive(words_of).rows.counts, config.max_words)
        return rules.apply(self.name, notes)
