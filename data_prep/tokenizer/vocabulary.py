"""A tokenizer.json and what the shards need to know of it; reading one of any usual format.

Design choices:
- A set holds a Hugging Face tokenizer.json, and that one is the truth. A tokenizer.json is kept byte for byte;
  tiktoken files and SentencePiece models are converted.
- What a file is, its content says, not its name: `tokenizer.model` may be either of the latter two.
- EOS stands at ends of documents only, so one whose text is encoded as its id wherever it stands is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from megatrain.data.format import TOKENIZER, id_dtype_name
from megatrain.data_prep.tokenizer import sentencepiece_file, tiktoken_file
from megatrain.errors import InputError, bad_value

if TYPE_CHECKING:
    import numpy as np

EOS = "<|endoftext|>"
"""The EOS of a tokenizer trained here, id 0."""
USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""What a tokenizer that doesn't tell may call its EOS."""
FILES = (TOKENIZER, "tokenizer.model")
"""What is looked for in a folder, in this order."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.json and what the shards need to know of it.

    vocab_size: one more than the largest id. sentencepiece: the model that `data` was converted from, if it was.
    """

    data: bytes
    eos_id: int
    vocab_size: int
    sentencepiece: bytes | None = None

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """uint16 or uint32, little-endian."""
        import numpy as np

        return np.dtype(id_dtype_name(self.vocab_size)).newbyteorder("<")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for text as it is: special tokens aren't found in it, nothing is cut off or filled up."""
        tokenizer = Tokenizer.from_str(self.data.decode())
        tokenizer.encode_special_tokens = True  # which means: as text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def load(path: Path, eos_token: str | None, split: str | None = None) -> Vocabulary:
    """Reads a tokenizer.json, a tiktoken file or a SentencePiece model, or that of a folder.

    eos_token: None takes tokenizer_config.json's, or the model's, else the one of USUAL_EOS that the vocabulary has.
    split: for a tiktoken file, one of tiktoken_file.ENCODINGS or a regex.
    Raises InputError if it isn't one, if its EOS can't be told, or can't be told from text.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), path / TOKENIZER)
    try:
        data = file.read_bytes()
        if split is not None and not tiktoken_file.is_tiktoken(data):
            raise bad_value("tokenizer.split", split, f"only for a tiktoken file, which {file} isn't")
        vocabulary = _read(data, file, eos_token, split)
    except OSError as error:
        raise bad_value("tokenizer.path", path, error.strerror or "can't be read") from None
    tokenizer = vocabulary.tokenizer()
    text = tokenizer.decode([vocabulary.eos_id], skip_special_tokens=False)
    if vocabulary.eos_id in tokenizer.encode(text, add_special_tokens=False).ids:
        raise bad_value("tokenizer.eos_token", eos_token, f"{text!r} in a document is encoded as the same id")
    return vocabulary


def _read(data: bytes, file: Path, eos_token: str | None, split: str | None) -> Vocabulary:
    eos, model = eos_token, None
    try:
        if data.lstrip()[:1] == b"{":
            kind, eos = "Hugging Face tokenizer.json", eos_token or _configured_eos(file)
        elif tiktoken_file.is_tiktoken(data):
            kind = "tiktoken file"
            if split is None:
                names = ", ".join(tiktoken_file.ENCODINGS)
                raise InputError(f"tokenizer.split: {file} is a tiktoken file; give its encoding ({names}) or a regex")
            eos = eos_token or EOS
            data = tiktoken_file.convert(data, split, eos)
        else:
            kind, model = "Hugging Face tokenizer.json, tiktoken file or SentencePiece model", data
            data, eos = sentencepiece_file.convert(data)
            eos = eos_token or eos
        ids = Tokenizer.from_str(data.decode()).get_vocab()
    except InputError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise bad_value("tokenizer.path", file, f"no usable {kind} ({error})") from None
    if eos is None:
        usual = [name for name in USUAL_EOS if name in ids]
        if len(usual) != 1:
            raise InputError(f"tokenizer.eos_token: {file} doesn't tell its EOS; give the token that ends a document")
        eos = usual[0]
    if eos not in ids:
        raise bad_value("tokenizer.eos_token", eos, f"no token of {file}")
    return Vocabulary(data, ids[eos], max(ids.values()) + 1, model)


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
