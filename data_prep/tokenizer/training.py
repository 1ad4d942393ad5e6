"""Training a byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatrain.data_prep.tokenizer.byte_level import SPLIT
from megatrain.data_prep.tokenizer.vocabulary import EOS, Vocabulary
from megatrain.errors import bad_value

SMALLEST = 256 + 1
"""Ids of a byte-level vocabulary without merges: the bytes and EOS."""


def train(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """A byte-level BPE of exactly `vocab_size` ids. The same texts in the same order give the same vocabulary.

    Raises InputError if `vocab_size` is too small for the bytes, or larger than the texts have merges for.
    """
    if vocab_size < SMALLEST:
        raise bad_value("tokenizer.vocab_size", vocab_size, f"at least {SMALLEST}: the bytes and EOS")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise bad_value("tokenizer.vocab_size", vocab_size, f"the text has only enough for {found}")
    return Vocabulary(tokenizer.to_str().encode(), tokenizer.get_vocab()[EOS], found)
