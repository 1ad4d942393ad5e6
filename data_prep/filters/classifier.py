"""A score by a fastText classifier of the user's, such as one for quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import ClassifierConfig
from megatrain.data_prep.filters.fasttext_model import Model
from megatrain.data_prep.filters.rules import Rules
from megatrain.data_prep.notes import Notes
from megatrain.errors import bad_value


class Classifier:
    """A step; see ClassifierConfig. InputError: the model can't be read, or doesn't know the label."""

    name = "classifier"

    def __init__(self, config: ClassifierConfig) -> None:
        self.config = config
        self.model = Model(Path(config.path or ""), "filters.classifier.path")
        if not self.model.has(config.label):
            raise bad_value("filters.classifier.label", config.label, f"a label of {config.path}")

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        scores = [self.model.probability(text, self.config.label) for text in documents.texts]
        rules = Rules(documents)
        rules.at_least("min_score", np.array(scores, np.float64), self.config.min_score)
        return rules.apply(self.name, notes)
