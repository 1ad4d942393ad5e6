"""Removal of what isn't text: control characters, terminal codes, noncharacters; and line ends as Unix has them."""

from __future__ import annotations

import pyarrow.compute as pc

from megatrain.data_prep.clean.changes import replace_where_different
from megatrain.data_prep.documents import Documents
from megatrain.data_prep.notes import Notes

LINE_ENDS = r"\r\n?|\x{85}|\x{2028}|\x{2029}"
OVERSTRIKE = r"[^\n]\x08"
"""Bold and underlined, as manual pages for terminals have them: the later character stays."""
TERMINAL = r"\x1b\[[0-?]*[ -/]*[@-~]"
"""ECMA-48, section 5.4: colours and the like."""
CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x{9f}\x{fdd0}-\x{fdef}\x{fffe}\x{ffff}"
INVISIBLE = r"\x{ad}\x{200b}\x{2060}\x{feff}"
"""Soft hyphen, zero-width space, word joiner, byte order mark. Not the joiners U+200C and U+200D."""


class ControlCharacters:
    """A step. Works in Arrow throughout."""

    name = "control"

    def __init__(self, invisible: bool) -> None:
        """invisible: whether to remove INVISIBLE too."""
        removed = CONTROL + INVISIBLE if invisible else CONTROL
        self._any = f"[{removed}]|{LINE_ENDS}"
        self._removed = f"{OVERSTRIKE}|{TERMINAL}|[{removed}]"

    def __call__(self, documents: Documents, notes: Notes) -> Documents:
        """Documents that nothing is left of are dropped."""
        text = documents.batch.column("text")
        if pc.any(pc.match_substring_regex(text, self._any)).as_py():
            text = pc.replace_substring_regex(text, LINE_ENDS, "\n")
            text = pc.replace_substring_regex(text, self._removed, "")
        return replace_where_different(self.name, documents, text, "removed", notes)
