"""What cleaning does to the texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatrain.errors import bad_value


@dataclass
class LinesConfig:
    """Rules for the lines of a text."""

    drop: list[str] = field(default_factory=list)
    """A line in which one of these regular expressions (RE2) is found is left out."""
    trailing_spaces: bool = False
    """Spaces and tabs at the end of lines are removed."""
    blank_lines: int | None = None
    """Of more empty lines than this in a row the others are removed; null: none."""


@dataclass
class CleanConfig:
    """Changes to texts that lose nothing a reader would miss. What HTML becomes is `read.html`."""

    unicode: bool = False
    """Text that was decoded by a wrong charset is repaired, and all is put in Unicode's normal form C."""
    control: bool = False
    """Control characters are removed, and lines end as Unix has it."""
    invisible: bool = False
    """With control, what has no width and no meaning is removed too: soft hyphens, zero-width spaces, byte order marks.
    Joiners stay, which Indic scripts and emoji need, and marks of direction."""
    lines: LinesConfig = field(default_factory=LinesConfig)


def check(config: CleanConfig) -> None:
    """Raises InputError for a value that can't be had. What isn't a regular expression fails where it's compiled."""
    if config.lines.blank_lines is not None and config.lines.blank_lines < 0:
        raise bad_value("clean.lines.blank_lines", config.lines.blank_lines, "at least 0, or null")
