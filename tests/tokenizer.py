"""A small byte-level BPE tokenizer for tests."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
"""The text of id 0."""


def make_tokenizer(path: Path, vocab_size: int = 300) -> Path:
    """Trains one on a few words, at most `vocab_size` ids, and saves it at `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the words of the text that the tokenizer of these tests is trained on, and the ends of them"
    tokenizer.train_from_iterator([words] * 4, trainer)
    tokenizer.save(str(path))
    return path


def load(path: Path) -> Tokenizer:
    """The saved one."""
    return Tokenizer.from_file(str(path))
