"""`megatrain average checkpoint=RUN_DIR last=5 output=DIR`: the mean of a run's last checkpoints.

Late in training the weights wander about a point that is better than where they are; their mean is nearer to it
(Izmailov et al. 2018; of checkpoints of a language model Sanyal et al. 2023).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatrain.checkpoint.folders import Found, read_state, scan
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.weights import MeanReader, write_run
from megatrain.command_config import AverageConfig
from megatrain.errors import DONE, InputError, bad_value
from megatrain.evaluate.loading import Checkpoint, open_step


def run(config: AverageConfig) -> int:
    """Writes the run directory and prints where the checkpoint is; the exit code."""
    newest, *others = [open_step(found.path) for found in _chosen(config, scan(Path(config.checkpoint)))]
    for other in others:
        _check_alike(newest, other)
    saved = read_state(newest.folder)
    state = TrainerState(
        step=saved["step"],
        optimizer_step=0,
        samples=saved["samples"],
        data={},
        config=saved["config"],
        tokenizer=saved["tokenizer"],
        wandb_run_id=None,
    )
    mean = MeanReader([newest.reader, *(other.reader for other in others)])
    print(write_run(Path(config.output), newest.model, mean, state, newest.tokenizer_path))
    return DONE


def _chosen(config: AverageConfig, found: list[Found[Path]]) -> list[Found[Path]]:
    """The checkpoints that are averaged, newest first. Raises InputError where they aren't there."""
    if (config.last is None) == (not config.steps):
        raise InputError("last or steps: give one of them, how many checkpoints or which")
    whole = [one for one in found if one.problem is None]
    if not whole:
        raise bad_value("checkpoint", config.checkpoint, "holds no whole checkpoint; give a run directory")
    if config.last is not None:
        if not 1 <= config.last <= len(whole):
            raise bad_value("last", config.last, f"legal: 1 to {len(whole)}, which {config.checkpoint} holds whole")
        return whole[: config.last]
    for step in config.steps:
        if step not in [one.step for one in whole]:
            held = ", ".join(str(one.step) for one in whole) or "none"
            raise bad_value(
                "steps", config.steps, f"{config.checkpoint} holds no whole checkpoint {step}; legal: {held}"
            )
    return [one for one in whole if one.step in config.steps]


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raises InputError where the two are of other models or have other ids."""
    if replace(other.model, name=first.model.name) != first.model:
        raise InputError(f"{other.folder}: another model than {first.folder}")
    if (other.tokenizer_sha256, other.eos_id) != (first.tokenizer_sha256, first.eos_id):
        raise InputError(f"{other.folder}: another tokenizer than {first.folder}")
