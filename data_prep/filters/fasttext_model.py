"""fastText models, to predict with."""

from __future__ import annotations

from pathlib import Path

from megatrain.errors import InputError


class Model:
    """A fastText classifier.

    InputError: fasttext-predict isn't installed, or the file isn't a model; names the key.
    """

    def __init__(self, path: Path, key: str) -> None:
        try:
            from fasttext import load_model
        except ImportError:
            raise InputError(f"{key}: fasttext-predict is missing: pip install 'megatrain[prep]'") from None
        try:
            self.model = load_model(str(path))
        except ValueError as error:
            raise InputError(f"{key}={path}: {error}") from None

    def likeliest(self, text: str) -> tuple[str, float]:
        """The most likely label and its probability; "" and 0 where the text has no word."""
        labels, scores = self.model.predict(_line(text), k=1)
        return (labels[0], min(scores[0], 1.0)) if labels else ("", 0.0)

    def probability(self, text: str, label: str) -> float:
        """The probability of a label."""
        labels, scores = self.model.predict(_line(text), k=-1)
        return min(float(scores[labels.index(label)]), 1.0)

    def has(self, label: str) -> bool:
        """Whether the model knows the label."""
        return label in self.model.predict("a", k=-1)[0]


def _line(text: str) -> str:
    """fastText takes a newline for the end of what is asked."""
    return text.replace("\n", " ")
