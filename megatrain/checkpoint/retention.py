"""Which checkpoints of a run stay: the last ones, those that are kept for ever, the best.

Design choices:
- What stays is a pure function of what is there, so it doesn't matter which start wrote what.
- A commit record goes first, durably: a removal that dies in between leaves an uncommitted folder, which nobody reads
  and the next start removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatrain.checkpoint.folders import read_state, scan
from megatrain.checkpoint.format import COMMIT
from megatrain.config import SavingConfig
from megatrain.resilience.files import sync_folder


def obsolete(losses: Mapping[int, float | None], config: SavingConfig) -> list[int]:
    """The steps that need not stay, ascending. losses: the held-out loss of each step that is saved, where known."""
    if config.keep_last == 0:
        return []
    steps = sorted(losses)
    stays = set(steps[-config.keep_last :])
    if config.keep_every:
        stays |= {step for step in steps if step % config.keep_every == 0}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    # Of equal ones the older: it stays the best until another is better.
    stays |= set(sorted(known, key=lambda step: (known[step], step))[: config.keep_best])
    return [step for step in steps if step not in stays]


def apply(run_dir: Path, config: SavingConfig) -> list[int]:
    """Removes what need not stay of a run directory's whole checkpoints; the steps. Raises OSError."""
    folders = {found.step: found.path for found in scan(run_dir) if found.problem is None}
    losses = {
        step: read_state(path).get("held_out_loss") if config.keep_best else None for step, path in folders.items()
    }
    gone = obsolete(losses, config)
    for step in gone:
        remove(folders[step])
    return gone


def remove(folder: Path) -> None:
    """Removes a committed step's folder."""
    (folder / COMMIT).unlink()
    sync_folder(folder)
    shutil.rmtree(folder)
