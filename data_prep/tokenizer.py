"""Text to ids: training a byte-level BPE, loading one, and encoding as fast as its vocabulary allows.

Design choices:
- What Hugging Face's tokenizers gives is the truth. tiktoken, about five times as fast, encodes where the vocabulary
  can be written as its ranks, and only after both agreed on documents of this very input.
- The text of a special token inside a document stays text: only the end of a document is an EOS.
- No BOS, no truncation, no padding, whatever the tokenizer.json asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatrain.data.format import TOKENIZER, id_dtype_name
from megatrain.errors import InputError, bad_value

EOS = "<|endoftext|>"
"""The EOS of a tokenizer trained here, id 0."""
USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""What a tokenizer without tokenizer_config.json may call its EOS."""
SMALLEST = 256 + 1
"""Ids of a byte-level vocabulary without merges: the bytes and EOS."""
SPLIT = "|".join(
    (
        r"'(?:[sSdDmMtT]|ll|LL|ve|VE|re|RE)",  # English contractions
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word with the space or sign before it
        r"\p{N}{1,3}",  # digits, three at a time
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # signs
        r"\s*[\r\n]+",  # ends of lines
        r"\s+(?!\S)",  # spaces but the last, which belongs to the word after it
        r"\s+",
    )
)
"""Where a tokenizer trained here splits text first. Both regex engines, tiktoken's and tokenizers', agree on it."""
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the ByteLevel pre-tokenizer splits at by itself (Radford et al. 2019, the released vocabulary)."""


TIKTOKEN = "tiktoken"
TOKENIZERS = "tokenizers"


class NotExportableError(Exception):
    """A vocabulary that tiktoken can't hold, and why."""


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
        self._tiktoken = _export(json.loads(vocabulary.data)) if backend == TIKTOKEN else None

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


def _export(tokenizer: dict[str, Any]) -> tiktoken.Encoding:
    """The parsed tokenizer.json as tiktoken has it: bytes to rank, where the lowest rank merges first.

    Raises NotExportableError where that would be another tokenizer.
    """
    model = tokenizer["model"]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}
    if model["type"] != "BPE" or any((model.get(key) or None) != (value or None) for key, value in plain.items()):
        raise NotExportableError("not a plain BPE")
    if tokenizer.get("normalizer"):
        raise NotExportableError("it normalizes text")
    added = {token["content"] for token in tokenizer["added_tokens"]}
    if not all(token["special"] for token in tokenizer["added_tokens"]):
        raise NotExportableError("it has added tokens that aren't special")
    byte_of = _byte_level_alphabet()
    try:
        ranks = {
            bytes(byte_of[character] for character in token): rank
            for token, rank in model["vocab"].items()
            if token not in added
        }
    except KeyError:
        raise NotExportableError("it isn't byte-level") from None
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise NotExportableError("it lacks some bytes")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [model["vocab"]["".join(merge)] for merge in merges]
    if any(first > second for first, second in pairwise(merged)):
        raise NotExportableError("its ids aren't in the order of its merges")
    return tiktoken.Encoding(
        "exported", pat_str=_split(tokenizer["pre_tokenizer"]), mergeable_ranks=ranks, special_tokens={}
    )


def _split(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regex of a byte-level pre-tokenizer: [Split, ByteLevel], or ByteLevel with GPT-2's own."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_SPLIT
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    raise NotExportableError("it splits text in another way")


def _byte_level_alphabet() -> dict[str, int]:
    """Characters to bytes, as byte-level BPE writes them: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
