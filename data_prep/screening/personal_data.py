"""The step that replaces e-mail addresses, IP addresses and telephone numbers, or drops documents with them.

Design choices:
- Arrow looks through a whole batch for documents that may have any; only those become Python strings.
- What is found is rather too little than too much: an IP address must be public, and not a part of a longer number (a
  version); a telephone number must have a form that other numbers don't.
- Which replacement comes is a matter of the place in the document, so the result depends on the document alone.
- The notes show documents as they are afterwards: a report holds no personal data.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes
from megatrain.data_prep.screening.config import Found, PersonalDataConfig

Spans = Iterator[tuple[int, int]]

NEVER_FIRST = ".!#$%'*+^_`{|}~-"
LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789" + NEVER_FIRST
"""What may stand before the @: RFC 5322's atom and dot, but for &, /, = and ?, which are rather parts of a URL."""
LONGEST_LOCAL = 64
"""Characters (RFC 5321)."""
DOMAIN = re.compile(r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9]")
IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.[0-9])", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])", re.ASCII)
PHONES = re.compile(
    r"""(?<![\w.+/-]) (?:
        \+ [1-9][0-9]{0,2} [ .-]? (?:\([0-9]{1,4}\)[ .-]?)? [0-9]{1,5} (?:[ .-]?[0-9]{2,5}){1,4}     # international
      | (?:1[ .-])? (?:\([2-9][0-9]{2}\)[ ]?|[2-9][0-9]{2}[.-]) [2-9][0-9]{2}[ .-][0-9]{4}             # North America
      | (?<!\b[0-9A-Fa-f]{2}[ .])0[1-9] ([ .])[0-9]{2} (?:\1[0-9]{2}){3} (?!\1[0-9A-Fa-f]{2}\b)     # France
      | 0(?:20[ ][378][0-9]{3}[ ][0-9]{4}|7[0-9]{3}[ ][0-9]{6}|1[0-9]{3}[ ][0-9]{6})                 # Britain
      | 1[3-9][0-9]([ -])[0-9]{4}\2[0-9]{4}                                                          # China, mobile
    ) (?![\w/-]|\.[0-9])""",
    re.ASCII | re.VERBOSE,
)
PHONE_HINT = (
    r"\+[1-9][0-9 ().-]{7}|[2-9][0-9]{2}[.)-] ?[2-9][0-9]{2}[ .-][0-9]{4}|0[1-9][ .][0-9]{2}[ .][0-9]{2}[ .][0-9]{2}"
    r"|0[0-9]{2,4} [0-9]{4}|1[3-9][0-9][ -][0-9]{4}[ -][0-9]{4}"
)
FEWEST_DIGITS, MOST_DIGITS = 8, 15
"""Of an international number (E.164)."""


@dataclass(frozen=True)
class Kind:
    """A kind of personal data. hint: a regular expression of RE2 that every document with any has a match of."""

    name: str
    hint: str
    find: Callable[[str], Spans]
    action: Found
    replacements: Sequence[str]


def emails(text: str) -> Spans:
    """Where the addresses are."""
    at, end = text.find("@"), 0
    while at >= 0:
        before = text[max(end, at - LONGEST_LOCAL - 1) : at]
        local = before[len(before.rstrip(LOCAL)) :].lstrip(NEVER_FIRST)
        start, domain = at - len(local), DOMAIN.match(text, at)
        end = at + 1
        if domain and 0 < len(local) <= LONGEST_LOCAL and not local.endswith("."):
            end = domain.end()
            if not _is_cased(text[start - 1 : start]) and not _is_cased(text[end : end + 1]):
                yield start, end
        at = text.find("@", end)


def ipv4(text: str) -> Spans:
    """Where the public addresses are."""
    return (found.span() for found in IPV4.finditer(text) if _is_public(found.group()))


def ipv6(text: str) -> Spans:
    """Where the public addresses are; those begin with a digit 2 or 3 (RFC 4291, 2.4, and IANA's allocations)."""
    return (found.span() for found in IPV6.finditer(text) if _is_public(found.group()))


def phones(text: str) -> Spans:
    """Where the numbers are."""
    for found in PHONES.finditer(text):
        digits = sum(character.isdigit() for character in found.group())
        if not found.group().startswith("+") or FEWEST_DIGITS <= digits <= MOST_DIGITS:
            yield found.span()


class PersonalData:
    """Replaces what is found, or drops the document."""

    name = "personal_data"

    def __init__(self, config: PersonalDataConfig) -> None:
        kinds = [
            Kind("email", "@", emails, config.email, config.email_replacements),
            Kind("ip", r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]", ipv4, config.ip, config.ip_replacements),
            Kind("ip", r"\b[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]", ipv6, config.ip, config.ipv6_replacements),
            Kind("phone", PHONE_HINT, phones, config.phone, config.phone_replacements),
        ]
        self._kinds = [kind for kind in kinds if kind.action is not Found.keep]

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        column = documents.batch.column("text")
        counts: dict[int, Counter[str]] = {}
        texts: dict[int, str] = {}
        for kind in self._kinds:
            hinted = pc.match_substring_regex(column, kind.hint).to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(hinted).tolist():
                text = texts.get(row) or column[row].as_py()
                replaced, count = _replaced(text, kind)
                if count:
                    texts[row] = replaced
                    counts.setdefault(row, Counter())[kind.name] += count
        if not counts:
            return notes.drop(self.name, documents, [None] * len(documents))
        after = list(documents.texts)
        reasons: list[str | None] = [None] * len(documents)
        what: list[str | None] = [None] * len(documents)
        values: list[str | None] = [None] * len(documents)
        dropping = {kind.name for kind in self._kinds if kind.action is Found.drop}
        for row, found in counts.items():
            after[row] = texts[row]
            reason = "_".join(sorted(dropping & set(found)))
            reasons[row], what[row] = (reason, None) if reason else (None, "_".join(sorted(found)))
            values[row] = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
        changed = documents.with_texts(after)
        notes.change(self.name, changed, what, values)
        return notes.drop(self.name, changed, reasons, values)


def _replaced(text: str, kind: Kind) -> tuple[str, int]:
    """The text with replacements, and how many."""
    parts = []
    end = count = 0
    for start, stop in kind.find(text):
        parts += [text[end:start], kind.replacements[count % len(kind.replacements)]]
        end = stop
        count += 1
    return "".join([*parts, text[end:]]), count


def _is_cased(character: str) -> bool:
    """Whether it is a letter of an alphabet, and so a part of the same word as one beside it."""
    return character.lower() != character.upper()


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
