"""Rules for lines: those that are left out by pattern, trailing spaces, empty lines in a row.

Design choices:
- RE2, which Arrow has, takes time in proportion to the text, whatever the pattern and whoever wrote the text.
- Boilerplate that is known by its words ("cookie policy") is the business of C4's filter, not of this.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from megatrain.data_prep.clean.changes import replace_where_different
from megatrain.data_prep.clean.config import LinesConfig
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes
from megatrain.errors import bad_value


class Lines:
    """A step. Works in Arrow throughout."""

    name = "lines"

    def __init__(self, config: LinesConfig) -> None:
        """Raises InputError for what isn't a regular expression."""
        self._rules: list[tuple[str, str]] = []
        if config.drop:
            self._rules.append((rf"(?m)^.*(?:{'|'.join(map(_checked, config.drop))}).*(?:\n|\z)", ""))
        if config.trailing_spaces:
            self._rules.append((r"(?m)[ \t]+$", ""))
        if config.blank_lines is not None:
            self._rules.append((rf"\n{{{config.blank_lines + 2},}}", "\n" * (config.blank_lines + 1)))

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        """Documents that nothing is left of are dropped."""
        text = documents.batch.column("text")
        for pattern, other in self._rules:
            text = pc.replace_substring_regex(text, pattern, other)
        return replace_where_different(self.name, documents, text, "changed", notes)


def _checked(pattern: str) -> str:
    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid as error:
        raise bad_value("clean.lines.drop", pattern, str(error)) from None
    return f"(?:{pattern})"
