"""Text to ids, as fast as the vocabulary allows.

Design choices:
- What Hugging Face's tokenizers gives is the truth. tiktoken, about five times as fast, encodes where the vocabulary
  can be written as its ranks, and only after both agreed on documents of this very input.
- The text of a special token inside a document stays text: only the end of a document is an EOS.
- No BOS, no truncation, no padding, whatever the tokenizer.json asks for.
- A batch of documents becomes one array, and by tiktoken no id is ever a Python integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tiktoken

from megatrain.data.format import LENGTH_DTYPE
from megatrain.data_prep.tokenizer import sentencepiece_file
from megatrain.data_prep.tokenizer.export import NotExportableError, to_tiktoken
from megatrain.data_prep.tokenizer.vocabulary import Vocabulary
from megatrain.errors import bad_value

if TYPE_CHECKING:
    import pyarrow as pa

Ids = npt.NDArray[Any]
"""uint16, uint32: [tokens]."""

TIKTOKEN = "tiktoken"
TOKENIZERS = "tokenizers"
AT_ONCE = 1 << 18
"""Characters that tokenizers is given at once, or a longer document: it keeps offsets and masks of all their tokens."""


class Encoder:
    """Encodes documents, EOS after each, by TIKTOKEN or TOKENIZERS. Both give the same ids; `pick_backend` says which.

    Raises NotExportableError for TIKTOKEN and a vocabulary that can't be its ranks.
    """

    def __init__(self, vocabulary: Vocabulary, backend: str) -> None:
        self._tokenizer = vocabulary.tokenizer()
        self._eos_id = vocabulary.eos_id
        self._id_dtype = vocabulary.id_dtype
        self._tiktoken = to_tiktoken(vocabulary.data) if backend == TIKTOKEN else None

    def encode_batch(self, texts: Sequence[str] | pa.LargeStringArray) -> tuple[Ids, npt.NDArray[np.uint32]]:
        """The ids of all texts [tokens], of the vocabulary's id type, EOS after each; their lengths uint32[texts]."""
        strings: Sequence[str] = texts if isinstance(texts, Sequence) else texts.to_pylist()
        return self._joined(self._by_tiktoken(strings) if self._tiktoken else self._by_tokenizers(strings))

    def check(self, texts: Sequence[str] | pa.LargeStringArray) -> int:
        """How many of `texts` have other ids from tokenizers."""
        if not self._tiktoken:
            return 0
        strings: Sequence[str] = texts if isinstance(texts, Sequence) else texts.to_pylist()
        pairs = zip(self._by_tiktoken(strings), self._by_tokenizers(strings), strict=True)
        return sum(not np.array_equal(fast, reference) for fast, reference in pairs)

    def _joined(self, documents: Iterable[Ids]) -> tuple[Ids, npt.NDArray[np.uint32]]:
        """One array of all documents, EOS after each, and their lengths."""
        parts = list(documents)
        lengths = np.array([len(ids) + 1 for ids in parts], LENGTH_DTYPE)
        joined = np.full(int(lengths.sum()), self._eos_id, self._id_dtype)
        start = 0
        for ids in parts:
            joined[start : start + len(ids)] = ids
            start += len(ids) + 1
        return joined, lengths

    def _by_tokenizers(self, texts: Sequence[str]) -> Iterator[Ids]:
        first = characters = 0
        for last, text in enumerate(texts, 1):
            characters += len(text)
            if characters >= AT_ONCE or last == len(texts):
                found = self._tokenizer.encode_batch_fast(list(texts[first:last]), add_special_tokens=False)
                yield from (np.array(each.ids, self._id_dtype) for each in found)
                first, characters = last, 0

    def _by_tiktoken(self, texts: Sequence[str]) -> Iterator[Ids]:
        assert isinstance(self._tiktoken, tiktoken.Encoding)
        for text in texts:
            try:
                yield self._tiktoken.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # its regex engine gives up on, say, a million spaces
                yield from self._by_tokenizers([text])


def pick_backend(vocabulary: Vocabulary, texts: Sequence[str]) -> tuple[str, str]:
    """TIKTOKEN where it can hold the vocabulary and gives the ids of TOKENIZERS on all of `texts`; and why.

    Raises InputError where the vocabulary was converted from a SentencePiece model, and `texts` show a difference.
    """
    if vocabulary.sentencepiece:
        unequal = sentencepiece_file.differing(vocabulary.sentencepiece, vocabulary.tokenizer(), texts)
        if unequal:
            raise bad_value(
                "tokenizer.path",
                "a SentencePiece model",
                f"as a tokenizer.json it differs on {unequal} documents of this input",
            )
    try:
        unequal = Encoder(vocabulary, TIKTOKEN).check(texts)
    except NotExportableError as error:
        return TOKENIZERS, f"the vocabulary isn't one for tiktoken: {error}"
    if unequal:
        return TOKENIZERS, f"tiktoken gave other ids on {unequal} of {len(texts)} documents"
    return TIKTOKEN, f"the same ids as tokenizers on {len(texts)} documents"
