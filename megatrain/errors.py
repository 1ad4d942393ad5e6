"""How a command ends: the exit codes, and the exceptions that carry them.

Design choices:
- An error a person can act on is a MegatrainError: one line, no traceback. Everything else is a bug, keeps its
  traceback and exits 1.
- This file imports nothing, so every part may use it, the offline stage included.
"""

DONE = 0
BUG = 1
BAD_INPUT = 2
GAVE_UP = 3
STOPPED = 75


class MegatrainError(Exception):
    """An end that a person understands from its one line; `exit_code` is what the process returns."""

    exit_code = BUG


class InputError(MegatrainError):
    """Bad input or configuration, found before any process is spawned."""

    exit_code = BAD_INPUT


class GaveUp(MegatrainError):
    """The work is incomplete and the same start won't help: a broken member, a full disk, failed units."""

    exit_code = GAVE_UP


def bad_value(key: str, given: object, legal: str) -> InputError:
    """The error for a key whose value can't be had: names the key, what was given and what is legal."""
    return InputError(f"{key}={given}: {legal}")
