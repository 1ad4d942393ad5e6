"""Which checkpoints of a run stay: the last ones, those that are kept for ever, the best.

Design choices:
- What stays is a pure function of what is there, so it doesn't matter which start wrote what.
- What can't be removed now is when the next checkpoint is there.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatrain.checkpoint.folders import F, read_state, scan
from megatrain.checkpoint.remote import remove
from megatrain.config import SavingConfig


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


def apply(run_dir: F, config: SavingConfig) -> list[int]:
    """Removes what need not stay of the checkpoints of a run directory, or of its copy; the steps. Raises OSError."""
    folders = {found.step: found.path for found in scan(run_dir) if found.problem is None}
    losses: dict[int, float | None] = dict.fromkeys(folders)
    if config.keep_best:
        losses = {step: read_state(path).get("held_out_loss") for step, path in folders.items()}
    gone = obsolete(losses, config)
    for step in gone:
        remove(folders[step])
    return gone
