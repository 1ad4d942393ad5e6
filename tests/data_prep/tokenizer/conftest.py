"""A small vocabulary for the tests of this folder."""

import json
from pathlib import Path

import pytest

from megatrain.data_prep.tokenizer import Vocabulary, train


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the vocabulary is trained on."""
    sources = [Path(__file__).with_name("test_backends.py"), Path(json.__file__), Path(json.decoder.__file__)]
    return [*(path.read_text() for path in sources), "naïve café 中文文本 हिन्दी 👩‍🚀 don't DON'T 12345"]


@pytest.fixture(scope="session")
def vocabulary(texts: list[str]) -> Vocabulary:
    return train(texts, 600)
