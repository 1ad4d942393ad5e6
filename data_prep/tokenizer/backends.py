"""Text to ids: training a byte-level BPE, loading one, and encoding as fast as its vocabulary allows.

Design choices:
- What Hugging Face's tokenizers gives is the truth. tiktoken, about five times as fast, encodes where the vocabulary
  can be written as its ranks, and only after both agreed on documents of this very input.
- The text of a special token inside a document stays text: only the end of a document is an EOS.
- No BOS, no truncation, no padding, whatever the tokenizer.json asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer

from megatrain.data_prep.tokenizer.export import NotExportableError, to_tiktoken
from megatrain.data_prep.tokenizer.vocabulary import Vocabulary

TIKTOKEN = "tiktoken"
TOKENIZERS = "tokenizers"


class Encoder:
    """Encodes documents, EOS after each, by TIKTOKEN or TOKENIZERS. Both give the same ids; `pick_backend` says which.

    Raises NotExportableError for TIKTOKEN and a vocabulary that can't be its ranks.
    """

    def __init__(self, vocabulary: Vocabulary, backend: str) -> None:
        self._tokenizer = Tokenizer.from_str(vocabulary.data.decode())
        self._tokenizer.encode_special_tokens = True  # which means: as text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eos_id = vocabulary.eos_id
        self._id_dtype = vocabulary.id_dtype
        self._tiktoken = to_tiktoken(vocabulary.data) if backend == TIKTOKEN else None

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The ids of each text, of the vocabulary's id type, EOS at the end."""
        ids = self._by_tiktoken(self._tiktoken, texts) if self._tiktoken else self._by_tokenizers(texts)
        return [np.array([*document, self._eos_id], self._id_dtype) for document in ids]

    def _by_tokenizers(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_tiktoken(self, encoding: tiktoken.Encoding, texts: Sequence[str]) -> list[list[int]]:
        ids = []
        for text in texts:
            try:
                ids.append(encoding.encode_ordinary(text))
            except BaseException as error:  # its regex engine panics on, say, a million spaces
                if type(error).__name__ != "PanicException":
                    raise
                ids += self._by_tokenizers([text])
        return ids


def pick_backend(vocabulary: Vocabulary, texts: Sequence[str]) -> tuple[str, str]:
    """TIKTOKEN where it can hold the vocabulary and gives the ids of TOKENIZERS on all of `texts`; and why."""
    try:
        fast = Encoder(vocabulary, TIKTOKEN).encode(texts)
    except NotExportableError as error:
        return TOKENIZERS, f"the vocabulary isn't one for tiktoken: {error}"
    reference = Encoder(vocabulary, TOKENIZERS).encode(texts)
    unequal = sum(not np.array_equal(a, b) for a, b in zip(fast, reference, strict=True))
    if unequal:
        return TOKENIZERS, f"tiktoken gave other ids on {unequal} of {len(texts)} documents"
    return TIKTOKEN, f"the same ids as tokenizers on {len(texts)} documents"
