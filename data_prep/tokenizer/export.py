"""A tokenizer.json as tiktoken has it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import tiktoken

from megatrain.data_prep.tokenizer.byte_level import GPT2_SPLIT, alphabet


class NotExportableError(Exception):
    """A vocabulary that tiktoken can't hold, and why."""


def to_tiktoken(data: bytes) -> tiktoken.Encoding:
    """A tokenizer.json as tiktoken has it: bytes to rank, where the lowest rank merges first.

    Raises NotExportableError where that would be another tokenizer.
    """
    tokenizer = json.loads(data)
    model = tokenizer["model"]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}
    if model["type"] != "BPE" or any((model.get(key) or None) != (value or None) for key, value in plain.items()):
        raise NotExportableError("not a plain BPE")
    if tokenizer.get("normalizer"):
        raise NotExportableError("it normalizes text")
    added = {token["content"] for token in tokenizer["added_tokens"]}
    if not all(token["special"] for token in tokenizer["added_tokens"]):
        raise NotExportableError("it has added tokens that aren't special")
    byte_of = alphabet()
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
