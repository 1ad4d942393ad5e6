"""A tokenizer for the small models, and one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", vocab_size=290)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
