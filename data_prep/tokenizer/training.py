"""Training a byte-level BPE.

Design choices:
- rustbpe counts and merges: about half the CPU seconds of the trainer of tokenizers, on all cores, and its result
  doesn't depend on how many there are.
- Two merges of it may make the same bytes, of which a tokenizer.json can hold one: a few more are trained than needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatrain.data_prep.tokenizer.byte_level import SPLIT, tokenizer_json
from megatrain.data_prep.tokenizer.vocabulary import EOS, Vocabulary
from megatrain.errors import InputError, bad_value

SMALLEST = 256 + 1
"""Ids of a byte-level vocabulary without merges: the bytes and EOS."""
SPARE = 64
"""Merges that are trained beyond those needed."""
LONGEST = 100_000
"""Characters of text that are split into words at once: regex engines give up on, say, a million spaces."""
AT_ONCE = 1024
"""Texts, of at most LONGEST characters, that rustbpe takes at once."""


def train(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """A byte-level BPE of exactly `vocab_size` ids, EOS the first. Equal texts in equal order give an equal vocabulary.

    Raises InputError if `vocab_size` is too small for the bytes, or larger than the texts have merges for.
    """
    if vocab_size < SMALLEST:
        raise bad_value("tokenizer.vocab_size", vocab_size, f"at least {SMALLEST}: the bytes and EOS")
    try:
        import rustbpe
    except ImportError:
        raise InputError("tokenizer.train=true: rustbpe isn't installed; pip install rustbpe") from None
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_pieces(texts), vocab_size + SPARE, buffer_size=AT_ONCE, pattern=SPLIT)
    tokens = list(dict.fromkeys(bytes(token) for token, _ in trainer.get_mergeable_ranks()))[: vocab_size - 1]
    if len(tokens) + 1 < vocab_size:
        raise bad_value("tokenizer.vocab_size", vocab_size, f"the text has only enough for {len(tokens) + 1}")
    ids = {token: number for number, token in enumerate(tokens, 1)}
    return Vocabulary(tokenizer_json(ids, SPLIT, {EOS: 0}), eos_id=0, vocab_size=vocab_size)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
