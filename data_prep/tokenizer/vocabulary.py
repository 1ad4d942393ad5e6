"""A tokenizer.json and what the shards need to know of it; loading one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megatrain.data.format import TOKENIZER, id_dtype_name
from megatrain.errors import InputError, bad_value

EOS = "<|endoftext|>"
"""The EOS of a tokenizer trained here, id 0."""
USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""What a tokenizer without tokenizer_config.json may call its EOS."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.json and what the shards need to know of it. `vocab_size` is one more than the largest id."""

    data: bytes
    eos_id: int
    vocab_size: int

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """uint16 or uint32, little-endian."""
        return np.dtype(id_dtype_name(self.vocab_size)).newbyteorder("<")


def load(path: Path, eos_token: str | None) -> Vocabulary:
    """Reads a Hugging Face tokenizer.json, or the one of a folder; its bytes are kept as they are.

    eos_token: None takes tokenizer_config.json's, else the one of USUAL_EOS that the vocabulary has.
    Raises InputError if it isn't one, or if its EOS can't be told.
    """
    file = path / TOKENIZER if path.is_dir() else path
    try:
        data = file.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode())
    except OSError as error:
        raise bad_value("tokenizer.path", path, error.strerror or "can't be read") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise bad_value("tokenizer.path", path, f"not a Hugging Face tokenizer.json ({error})") from None
    vocabulary = tokenizer.get_vocab()
    token = eos_token or _configured_eos(file)
    if token is None:
        usual = [name for name in USUAL_EOS if name in vocabulary]
        if len(usual) != 1:
            raise InputError(f"tokenizer.eos_token: {file} doesn't tell its EOS; give the token that ends a document")
        token = usual[0]
    if token not in vocabulary:
        raise bad_value("tokenizer.eos_token", token, f"no token of {file}")
    return Vocabulary(data, vocabulary[token], max(vocabulary.values()) + 1)


def _configured_eos(file: Path) -> str | None:
    """The EOS that the tokenizer_config.json beside a tokenizer.json names."""
    config = file.with_name("tokenizer_config.json")
    if file.name != TOKENIZER or not config.is_file():
        return None
    try:
        token = json.loads(config.read_bytes()).get("eos_token")
    except (ValueError, AttributeError):
        raise InputError(f"{config}: not a JSON object") from None
    return token.get("content") if isinstance(token, dict) else token
