"""Byte-level BPE: how its vocabulary stands in a tokenizer.json.

Byte-level BPE (Radford et al. 2019) splits text by a regex into words and merges the bytes of each. tiktoken and
rustbpe know a vocabulary by its ranks: whatever two neighbours together are a token may merge, the lowest rank first.

Design choices:
- All pairs that make a token are its merges here, not one of them: so a tokenizer.json merges what the ranks merge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

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
"""Where a tokenizer trained here splits text first. tiktoken, rustbpe and tokenizers split alike by it."""
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the ByteLevel pre-tokenizer splits at by itself (Radford et al. 2019, the released vocabulary)."""


def alphabet() -> dict[str, int]:
    """Characters to bytes, as byte-level BPE writes them: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def merges(ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that together are a token, those of the least id first; the longer left part before."""
    for token in sorted(ids, key=ids.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in ids and token[cut:] in ids:
                yield token[:cut], token[cut:]


def tokenizer_json(ids: Mapping[bytes, int], split: str, special: Mapping[str, int]) -> bytes:
    """A tokenizer.json. ids: of the tokens, in the order of merging; split: a regex; special: the ids of others."""
    character = {byte: sign for sign, byte in alphabet().items()}
    vocabulary = {"".join(map(character.__getitem__, token)): number for token, number in ids.items()}
    pairs = list(merges(vocabulary))
    model = {
        "type": "BPE",
        "unk_token": None,
        "vocab": {**special, **vocabulary},
        "merges": pairs,
        "ignore_merges": True,
    }
    splits = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return as_json(
        added_tokens=[added_token(token, number, special=True) for token, number in special.items()],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": splits},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=model,
    )


def added_token(content: str, number: int, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`. special: it isn't found in text."""
    sides = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": number, "content": content, **sides, "normalized": False, "special": special}


def as_json(**parts: Any) -> bytes:
    """The bytes of a tokenizer.json with these parts."""
    rest = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    return json.dumps(rest | parts, ensure_ascii=False, separators=(",", ":")).encode()
