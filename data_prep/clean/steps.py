"""The steps of cleaning that a configuration asks for, in their order."""

from __future__ import annotations

from megatrain.data_prep.clean.config import CleanConfig, LinesConfig
from megatrain.data_prep.clean.control import ControlCharacters
from megatrain.data_prep.clean.lines import Lines
from megatrain.data_prep.step import Step
from megatrain.errors import bad_value


def cleaning(config: CleanConfig) -> list[Step]:
    """Charsets first: some of what they break looks like control characters.

    Raises InputError for a pattern that is none, or a library that isn't installed.
    """
    steps: list[Step] = []
    if config.unicode:
        try:
            from megatrain.data_prep.clean.mojibake import UnicodeRepair
        except ImportError as error:
            raise bad_value("clean.unicode", config.unicode, f"{error}; pip install 'megatrain[prep]'") from None
        steps.append(UnicodeRepair())
    if config.control:
        steps.append(ControlCharacters(config.invisible))
    if config.lines != LinesConfig():
        steps.append(Lines(config.lines))
    return steps
