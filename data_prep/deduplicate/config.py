"""The configuration of deduplication. Only types and the checks that need nothing but the values."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatrain.errors import bad_value


@dataclass
class FuzzyConfig:
    """Documents that are almost alike: MinHash signatures cut into bands (Broder 1997; Leskovec, Rajaraman and Ullman,
    Mining of Massive Datasets, 3.4). Two documents whose sets of n-grams have the Jaccard similarity s are found with
    the probability 1 - (1 - s**rows)**bands. The defaults are FineWeb's (Penedo et al. 2024, 3.4): 0.92 at s = 0.8."""

    enabled: bool = False
    """Whether to look for them."""
    ngram: int = 5
    """Words of an n-gram. In scripts without spaces every character counts as a word."""
    bands: int = 14
    """Groups of MinHash values; documents with one group alike are duplicates."""
    rows: int = 8
    """MinHash values of a band."""
    seed: int = 1
    """Of the hash functions."""


@dataclass
class ParagraphsConfig:
    """Lines that an earlier document has are taken out of the later ones."""

    enabled: bool = False
    """Whether to look for them."""
    min_characters: int = 80
    """Shorter lines stay, repeated or not: headings, list items, verses."""
    min_left_characters: int = 200
    """A document that loses lines and is left with less than this is dropped."""


@dataclass
class DeduplicateConfig:
    """Of documents alike, the first in the order of the input stays."""

    exact: bool = False
    """Drop documents whose text is an earlier one's, but for white space and the form of Unicode."""
    fuzzy: FuzzyConfig = field(default_factory=FuzzyConfig)
    """Drop documents that are almost an earlier one."""
    paragraphs: ParagraphsConfig = field(default_factory=ParagraphsConfig)
    """Take repeated lines out of documents."""
    across_sources: bool = True
    """Compare documents of different sources; false: only those of the same one."""
    memory_bytes: int = 512 * 1024 * 1024
    """What a task of the exchange between units may hold in memory."""


def check(config: DeduplicateConfig) -> None:
    """Raises InputError for a value that can't be had."""
    counts = {
        "deduplicate.fuzzy.ngram": config.fuzzy.ngram,
        "deduplicate.fuzzy.bands": config.fuzzy.bands,
        "deduplicate.fuzzy.rows": config.fuzzy.rows,
        "deduplicate.paragraphs.min_characters": config.paragraphs.min_characters,
    }
    for key, value in counts.items():
        if value < 1:
            raise bad_value(key, value, "at least 1")
    if not 0 <= config.fuzzy.seed < 2**32:
        raise bad_value("deduplicate.fuzzy.seed", config.fuzzy.seed, "from 0 to 2**32 - 1")
    if config.memory_bytes < 1 << 20:
        raise bad_value("deduplicate.memory_bytes", config.memory_bytes, "at least 1048576 (1 MiB)")
