"""Checkpoints of weights alone: what import and average write, and what a run begins with, not goes on from.

Design choices:
- The format is that of any checkpoint (docs/checkpoint.md), with masters, no moments, and `weights_only` in its state.
  What reads weights from a checkpoint reads these.
- Written by one process from any ShardReader, block by block: memory doesn't grow with the model.
- They stand in a run directory with tokenizer and configuration, which appears whole or not at all (law 6).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from megatrain.checkpoint.folders import step_folder
from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.writer import commit, write_rank
from megatrain.config import ModelConfig
from megatrain.data.format import TOKENIZER
from megatrain.engines.ranges import MASTER, Shard, ShardReader
from megatrain.errors import GaveUp, bad_value
from megatrain.model.spec import parameters
from megatrain.resilience.files import sync_folder, temporary_beside, write_synced
from megatrain.storage import Folder

BLOCK_ELEMENTS = 1 << 24
"""Elements that are read and written at once (64 MiB in fp32)."""


def write_run(output: Path, model: ModelConfig, reader: ShardReader, state: TrainerState, tokenizer: Folder) -> Path:
    """Makes the run directory `output`: a checkpoint of the weights that `reader` has, tokenizer.json, config.yaml.

    tokenizer: the tokenizer.json that is copied. Returns the checkpoint's folder. Raises InputError where `output`
    exists and isn't empty, GaveUp where it can't be written; nothing is left of it then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise bad_value("output", output, "exists; give a new or empty folder")
    temporary = temporary_beside(output)
    try:
        temporary.mkdir(parents=True)
        folder = write_weights(temporary, model, reader, state)
        write_synced(temporary / TOKENIZER, tokenizer.read_bytes())
        write_synced(temporary / "config.yaml", OmegaConf.to_yaml(state["config"]).encode())
        sync_folder(temporary)
        temporary.replace(output)
        sync_folder(output.absolute().parent)
    except OSError as error:
        raise GaveUp(f"{output}: not written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output / folder.relative_to(temporary)


def write_weights(run_dir: Path, model: ModelConfig, reader: ShardReader, state: TrainerState) -> Path:
    """Writes a checkpoint of the masters that `reader` has, for state["step"]; returns its folder.

    Raises OSError, FileExistsError where the run directory holds one of that step; nothing is left of it then.
    """
    folder = step_folder(run_dir, state["step"])
    folder.mkdir(parents=True)
    try:
        write_rank(folder, 0, _shards(model, reader))
        commit(folder, state["step"], 1, {**state, "weights_only": True})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    sync_folder(run_dir)
    return folder


def _shards(model: ModelConfig, reader: ShardReader) -> Iterator[Shard]:
    """Every parameter's master, in blocks."""
    for parameter in parameters(model):
        for start in range(0, parameter.size, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, parameter.size)
            values = reader.read(MASTER, parameter.name, start, stop)
            yield Shard(parameter.name, parameter.shape, ((start, stop),), {MASTER: values})


class MeanReader:
    """The mean of several checkpoints of one model, as a ShardReader: a fresh optimizer's state."""

    optimizer_step = 0

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`: 1-D, on the CPU, in the dtype of the first one's.

        state "master": the mean, taken in float64. Any other state: 0.
        """
        first = self._readers[0].read(MASTER, name, start, stop)
        if state != MASTER:
            return torch.zeros_like(first)
        total = first.double()
        for reader in self._readers[1:]:
            total += reader.read(MASTER, name, start, stop)
        return (total / len(self._readers)).to(first.dtype)
