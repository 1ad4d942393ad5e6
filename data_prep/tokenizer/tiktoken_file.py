"""tiktoken files: a line a token, its bytes in base64 and its rank. What splits text isn't in the file."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from megatrain.data_prep.tokenizer.byte_level import GPT2_SPLIT, tokenizer_json
from megatrain.errors import bad_value

FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


@dataclass(frozen=True)
class Encoding:
    """What tiktoken knows of an encoding besides its file: the regex that splits text, and the special tokens."""

    split: str
    special: dict[str, int]


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s+(?!\S)|\s+"
_CL100K = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        _SPACES,
    )
)
_FILL = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}

ENCODINGS = {
    "r50k_base": Encoding(GPT2_SPLIT, {"<|endoftext|>": 50256}),
    "p50k_base": Encoding(GPT2_SPLIT, {"<|endoftext|>": 50256}),
    "cl100k_base": Encoding(_CL100K, {"<|endoftext|>": 100257, **_FILL, "<|endofprompt|>": 100276}),
    "o200k_base": Encoding(_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
"""Those that the tiktoken package publishes, by its names for them."""


def is_tiktoken(data: bytes) -> bool:
    """Whether this begins as a tiktoken file does."""
    return FIRST_LINE.match(data) is not None


def convert(data: bytes, split: str, eos_token: str) -> bytes:
    """The tokenizer.json of a tiktoken file.

    split: the name of one of ENCODINGS, or a regex; then `eos_token` is the only special token, after all ranks.
    Raises ValueError if a line isn't one of the format, or if bytes are missing; InputError for the regex.
    """
    ids = {}
    for line in data.splitlines():
        token, rank = line.split()
        ids[base64.b64decode(token, validate=True)] = int(rank)
    if not all(bytes([byte]) in ids for byte in range(256)):
        raise ValueError("it lacks some bytes")
    encoding = ENCODINGS.get(split) or Encoding(split, {eos_token: max(ids.values()) + 1})
    if used := [token for token, number in encoding.special.items() if number in ids.values()]:
        raise bad_value("tokenizer.split", split, f"the file isn't of this encoding: its ids hold that of {used[0]}")
    return tokenizer_json(ids, encoding.split, encoding.special)
