"""Text to ids, as fast as the vocabulary allows.

Design choices:
- What Hugging Face's tokenizers gives is the truth. tiktoken, about five times as fast, encodes where the vocabulary
  can be written as its ranks, and only after both agreed on documents of this very input.
- The text of a special token inside a document stays text: only the end of a document is an EOS.
- No BOS, no truncation, no padding, whatever the tokenizer.json asks for.
- A batch of documents becomes one array; the ids of one document are Python integers for a moment only. tiktoken's
  encode_to_numpy, which avoids that, is a quarter slower than encode_ordinary: it looks for special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tiktoken

from megatrain.data_prep.tokenizer import sentencepiece_file
from megatrain.data_prep.tokenizer.export import NotExportableError, to_tiktoken
from megatrain.data_prep.tokenizer.vocabulary import Vocabulary
from megatrain.errors import bad_value

if TYPE_CHECKING:
    import pyarrow as pa

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

    def encode_batch(self, texts: Sequence[str] | pa.LargeStringArray) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The ids of all texts [tokens], of the vocabulary's id type, EOS after each; their lengths uint32[texts]."""
        strings: Sequence[str] = texts if isinstance(texts, Sequence) else texts.to_pylist()
        return self._joined(self._by_tiktoken(strings) if self._tiktoken else self._by_tokenizers(strings))

    def check(self, texts: Sequence[str] | pa.LargeStringArray) -> int:
        """How many of `texts` have other ids from tokenizers."""
        if not self._tiktoken:
            return 0
        strings: Sequence[str] = texts if isinstance(texts, Sequence) else texts.to_pylist()
        pairs = zip(self._by_tiktoken(strings), self._by_tokenizers(strings), strict=True)
        return sum(fast != reference for fast, reference in pairs)

    def _joined(self, documents: Iterator[list[int]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        arrays = [np.array([*ids, self._eos_id], self._id_dtype) for ids in documents]
        lengths = np.array([len(ids) for ids in arrays], "<u4")
        return np.concatenate([*arrays, np.empty(0, self._id_dtype)]), lengths

    def _by_tokenizers(self, texts: Sequence[str]) -> Iterator[list[int]]:
        first = characters = 0
        for last, text in enumerate(texts, 1):
            characters += len(text)
            if characters >= AT_ONCE or last == len(texts):
                found = self._tokenizer.encode_batch_fast(list(texts[first:last]), add_special_tokens=False)
                yield from (each.ids for each in found)
                first, characters = last, 0

    def _by_tiktoken(self, texts: Sequence[str]) -> Iterator[list[int]]:
        assert isinstance(self._tiktoken, tiktoken.Encoding)
        for text in texts:
            try:
                yield self._tiktoken.encode_ordinary(text)
            except BaseException as error:  # its regex engine panics on, say, a million spaces
                if type(error).__name__ != "PanicException":
                    raise
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
