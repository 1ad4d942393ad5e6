"""The configuration of screening. Only types and the checks that need nothing but the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from megatrain.errors import bad_value


class Found(Enum):
    """What is done where personal data is found."""

    keep = "keep"
    replace = "replace"
    drop = "drop"


class Contaminated(Enum):
    """What is done where a text of an evaluation set is found."""

    document = "document"
    span = "span"


@dataclass
class PersonalDataConfig:
    """Each kind: keep, replace (by the strings given, in turn) or drop (the document)."""

    email: Found = Found.keep
    """Addresses NAME@DOMAIN."""
    ip: Found = Found.keep
    """IP addresses, versions 4 and 6, of the public ranges."""
    phone: Found = Found.keep
    """Telephone numbers: international ones, and those in the common forms of North America, Britain, France, China."""
    email_replacements: list[str] = field(
        default_factory=lambda: ["email@example.com", "firstname.lastname@example.org"]
    )
    """FineWeb's (Penedo et al. 2024): domains that exist for examples."""
    ip_replacements: list[str] = field(
        default_factory=lambda: [
            "22.214.171.124",
            "126.96.36.199",
            "188.8.131.52",
            "184.108.40.206",
            "220.127.116.11",
            "18.104.22.168",
        ]
    )
    """FineWeb's: addresses that didn't answer."""
    ipv6_replacements: list[str] = field(default_factory=lambda: ["2001:db8::1", "2001:db8::2"])
    """Of the range that exists for documentation (RFC 3849)."""
    phone_replacements: list[str] = field(default_factory=lambda: ["+1-202-555-0123", "+1-202-555-0187"])
    """Of the numbers that exist for fiction."""


@dataclass
class DecontaminateConfig:
    """Documents that hold what models are evaluated on."""

    files: list[str] = field(default_factory=list)
    """The evaluation sets: .txt (a text a line) and .jsonl; none: nothing is done."""
    keys: list[str] = field(default_factory=lambda: ["text", "question", "query", "context", "answer", "choices"])
    """Which values of a .jsonl record are its texts: strings, or lists of strings."""
    ngram: int = 13
    """Words in a row that a document and a text must have in common (GPT-3: Brown et al. 2020, appendix C). A shorter
    text must be in the document whole."""
    min_words: int = 8
    """Texts of fewer words aren't looked for: answers such as "in the kitchen" are everywhere."""
    action: Contaminated = Contaminated.document
    """document: it is dropped. span: the words in common are taken out, with `margin` characters on either side; pieces
    that are left shorter than that go too."""
    margin: int = 200
    """Characters (GPT-3, appendix C)."""
    max_spans: int = 10
    """A document with more spans is dropped (GPT-3, appendix C)."""


def check(personal_data: PersonalDataConfig, decontaminate: DecontaminateConfig) -> None:
    """Raises InputError for a value that can't be had."""
    for name in ("email", "ip", "ipv6", "phone"):
        key = f"{name}_replacements"
        if not getattr(personal_data, key):
            raise bad_value(f"personal_data.{key}", [], "one or more strings")
    counts = {"ngram": 1, "min_words": 1, "margin": 0, "max_spans": 1}
    for name, least in counts.items():
        value = getattr(decontaminate, name)
        if value < least:
            raise bad_value(f"decontaminate.{name}", value, f"at least {least}")
    if decontaminate.min_words > decontaminate.ngram:
        raise bad_value("decontaminate.min_words", decontaminate.min_words, "at most decontaminate.ngram")
    if decontaminate.files and not decontaminate.keys:
        raise bad_value("decontaminate.keys", [], "one or more keys")
