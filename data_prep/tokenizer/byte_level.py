"""What byte-level vocabularies have in common: how bytes are written as characters, and where text is split first.

Byte-level BPE (Radford et al. 2019) splits text by a regex into words and merges bytes within each.
"""

from __future__ import annotations

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


def alphabet() -> dict[str, int]:
    """Characters to bytes, as byte-level BPE writes them: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
