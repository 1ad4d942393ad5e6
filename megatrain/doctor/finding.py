"""One thing that was looked at, and whether it is well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """check: what was looked at. value: what was seen. problem: a sentence without its end, None where all is well."""

    check: str
    value: str
    problem: str | None = None
