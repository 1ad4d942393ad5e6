"""From `checkpoint=PATH` to a model: what eval, generate and export begin with.

Design choices:
- The model is whole, on this process's device, and is filled parameter by parameter from the checkpoint's ranges,
  whatever layout wrote them.
- The tokenizer is the run directory's copy of the one that made the data, and is checked against the hash in the
  checkpoint: a model with other ids would talk nonsense without an error.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from megatrain import device
from megatrain.checkpoint.folders import resolve
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import ModelConfig, ObjectiveConfig, Precision
from megatrain.data.format import TOKENIZER
from megatrain.engines.ranges import MASTER, ShardReader
from megatrain.errors import InputError
from megatrain.model.transformer import Transformer

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, and what its state says of model and data."""

    folder: Path
    reader: CheckpointReader
    model: ModelConfig
    objective: ObjectiveConfig
    sequence_length: int
    document_mask: bool
    eos_id: int
    tokenizer_sha256: str

    @property
    def tokenizer_path(self) -> Path:
        """The run directory's tokenizer.json. Raises InputError where it is missing or another one."""
        path = self.folder.resolve().parents[1] / TOKENIZER
        if not path.is_file():
            raise InputError(f"{path}: missing; it is the tokenizer of the checkpoint {self.folder}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.tokenizer_sha256:
            raise InputError(f"{path}: not the tokenizer that {self.folder} was trained with (sha256 differs)")
        return path


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that `checkpoint=path` means. Raises InputError where there is none, GaveUp where it is broken."""
    folder = resolve(path)
    reader = CheckpointReader(folder)
    config, tokenizer = reader.state["config"], reader.state["tokenizer"]
    return Checkpoint(
        folder=folder,
        reader=reader,
        model=_typed(ModelConfig, config["model"]),
        objective=_typed(ObjectiveConfig, config["objective"]),
        sequence_length=config["sequence_length"],
        document_mask=config["data"]["document_mask"],
        eos_id=tokenizer["eos_id"],
        tokenizer_sha256=tokenizer["sha256"],
    )


def _typed(schema: type[T], values: dict[str, Any]) -> T:
    """The dataclass of saved values."""
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    assert isinstance(result, schema)
    return result


def load_model(reader: ShardReader, config: ModelConfig, precision: Precision) -> Transformer:
    """The whole model on this process's device, for inference, with the weights that `reader` has."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(device.DTYPES[precision.value])
    try:
        with device.device():
            model = Transformer(config)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(reader.read(MASTER, name, 0, parameter.numel()).view_as(parameter))
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer as the data were made with it: special tokens in a text are text, nothing is cut or padded."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # which means: as text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
