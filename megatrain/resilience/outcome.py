"""How a run ended: outcome.json in its run directory, from which the launcher takes its exit code.

Design choices:
- The file is linked into place, not renamed: a link fails where the name exists, so the first rank to say why it
  ended wins, and what it says is there whole or not at all. Ranks that fail because another did come later.
- No torch: the launcher reads and writes here too.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatrain.errors import DONE, STOPPED
from megatrain.resilience.files import sync_folder, temporary_beside, write_synced

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    exit_code: as in errors.py. reason: one line. step: steps done by then, None where training hadn't begun.
    rank: who says so, None: the launcher. time: seconds since 1970.
    """

    exit_code: int
    reason: str
    step: int | None
    rank: int | None
    time: float


def write_outcome(run_dir: Path, exit_code: int, reason: str, step: int | None, rank: int | None) -> bool:
    """Writes outcome.json unless it is there; whether this call did. Done and stopped are rank 0's to say."""
    if exit_code in (DONE, STOPPED) and rank:
        return False
    path = run_dir / OUTCOME
    outcome = Outcome(exit_code, reason, step, rank, round(time.time(), 3))
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, json.dumps(asdict(outcome)).encode() + b"\n")
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(run_dir)
    return True


def read_outcome(run_dir: Path) -> Outcome | None:
    """What outcome.json says; None where no rank lived to write one."""
    try:
        return Outcome(**json.loads((run_dir / OUTCOME).read_bytes()))
    except FileNotFoundError:
        return None


def clear_outcome(run_dir: Path, before: float = math.inf) -> None:
    """Removes the outcome of an earlier start, one from before `before`, seconds since 1970. One process does it."""
    outcome = read_outcome(run_dir)
    if outcome is not None and outcome.time < before:
        (run_dir / OUTCOME).unlink()
