"""The configuration of the tokenizer. Only types and the checks that need nothing but the values."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.errors import bad_value


@dataclass
class TokenizerConfig:
    """Where the tokenizer comes from: give path, or train=true."""

    path: str | None = None
    """A Hugging Face tokenizer.json, a tiktoken file, a SentencePiece model; or a folder that holds tokenizer.json or
    tokenizer.model."""
    split: str | None = None
    """What a tiktoken file doesn't hold: the name of its encoding (r50k_base, p50k_base, cl100k_base, o200k_base), or
    the regex that splits text before it."""
    train: bool = False
    """Train a byte-level BPE on the input."""
    vocab_size: int = 32000
    """Ids of a trained tokenizer, its EOS included."""
    train_bytes: int = 256 * 1024 * 1024
    """Bytes of text that a tokenizer is trained on, taken from all over the input."""
    eos_token: str | None = None
    """The token that ends a document; null: what tokenizer_config.json or the model says, else the usual names."""
    parity_documents: int = 16
    """Documents of each unit that are encoded by Hugging Face's tokenizers too, where something faster encodes; if
    their ids differ, the whole unit is."""


def check(config: TokenizerConfig) -> None:
    """Raises InputError for a value that can't be had."""
    if (config.path is None) == (not config.train):
        raise bad_value("tokenizer.path", config.path, "give this or tokenizer.train=true, not both")
    if config.split is not None and config.train:
        raise bad_value("tokenizer.split", config.split, "only for a tiktoken file that tokenizer.path names")
    if config.train_bytes < 1:
        raise bad_value("tokenizer.train_bytes", config.train_bytes, "at least 1")
    if config.parity_documents < 0:
        raise bad_value("tokenizer.parity_documents", config.parity_documents, "at least 0")
