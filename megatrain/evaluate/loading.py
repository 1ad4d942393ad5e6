"""From `checkpoint=PATH` to a model: what eval, generate and export begin with.

Design choices:
- The model is whole, on this process's device, and is filled parameter by parameter from the checkpoint's ranges,
  whatever layout wrote them; a Hugging Face folder is read as it is.
- The tokenizer is the run directory's copy of the one that made the data, and is checked against the hash in the
  checkpoint: a model with other ids would talk nonsense without an error.
- Damage is found when a chunk is read, after the choice of a checkpoint. Who names a run directory means its newest
  whole one, so then the next older one is taken, and said so; who names a step means that one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from megatrain import device
from megatrain.checkpoint.folders import meant, resolve
from megatrain.checkpoint.format import BrokenCheckpoint
from megatrain.checkpoint.huggingface.config import is_hugging_face
from megatrain.checkpoint.huggingface.reader import HuggingFaceReader
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import KernelsConfig, ModelConfig, ObjectiveConfig, Precision
from megatrain.data.format import TOKENIZER
from megatrain.data_config import DataConfig
from megatrain.engines.ranges import MASTER, ShardReader
from megatrain.errors import InputError, bad_value
from megatrain.model.choice import choose
from megatrain.model.transformer import Transformer
from megatrain.storage import Folder

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights, and what is known of the model and its data.

    folder: of a step, or Hugging Face's. step: of the run; 0 of a model from elsewhere.
    """

    folder: Folder
    reader: ShardReader
    step: int
    model: ModelConfig
    objective: ObjectiveConfig
    sequence_length: int
    document_mask: bool
    eos_id: int
    tokenizer: Folder
    tokenizer_sha256: str

    @property
    def tokenizer_path(self) -> Folder:
        """Its tokenizer.json. Raises InputError where it is missing or another one."""
        if not self.tokenizer.is_file():
            raise InputError(f"{self.tokenizer}: missing; it is the tokenizer of the checkpoint {self.folder}")
        if _sha256(self.tokenizer) != self.tokenizer_sha256:
            raise InputError(
                f"{self.tokenizer}: not the tokenizer that {self.folder} was trained with (sha256 differs)"
            )
        return self.tokenizer


def attempt(path: str | Path, use: Callable[[Checkpoint], T]) -> T:
    """What `use` makes of the checkpoint that `checkpoint=path` means.

    Of a run directory each whole checkpoint has its turn, newest first, until `use` finds one unaltered; those that
    are passed over are warned of. Raises InputError where there is none, BrokenCheckpoint where the step's folder that
    was named, or every checkpoint, is altered.
    """
    if is_hugging_face(Path(path)):
        return use(open_hugging_face(Path(path)))
    altered: BrokenCheckpoint | None = None
    for folder in meant(path):
        if altered is not None:
            log.warning("passed over: %s", altered)
        try:
            return use(open_step(folder))
        except BrokenCheckpoint as error:
            altered = error
    assert altered is not None, "there is at least one"
    raise altered


def open_checkpoint(path: str | Path) -> Checkpoint:
    """What `checkpoint=path` means. Raises InputError where there is none, BrokenCheckpoint where it is altered."""
    if is_hugging_face(Path(path)):
        return open_hugging_face(Path(path))
    return open_step(resolve(path))


def open_step(folder: Folder) -> Checkpoint:
    """The checkpoint in a step's folder. Raises BrokenCheckpoint."""
    reader = CheckpointReader(folder)
    config, tokenizer = reader.state["config"], reader.state["tokenizer"]
    return Checkpoint(
        folder=folder,
        reader=reader,
        step=reader.state["step"],
        model=_typed(ModelConfig, config["model"]),
        objective=_typed(ObjectiveConfig, config["objective"]),
        sequence_length=config["sequence_length"],
        document_mask=config["data"]["document_mask"],
        eos_id=tokenizer["eos_id"],
        tokenizer=folder.resolve().parents[1] / TOKENIZER,
        tokenizer_sha256=tokenizer["sha256"],
    )


def open_hugging_face(folder: Path, key: str = "checkpoint") -> Checkpoint:
    """The model in a Hugging Face folder. Raises InputError, naming `key` or the file, where it isn't one of ours."""
    if not is_hugging_face(folder):
        raise bad_value(key, folder, "no config.json in it; give a Hugging Face folder")
    reader = HuggingFaceReader(folder)
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        raise InputError(f"{tokenizer}: missing; save the tokenizer with transformers' AutoTokenizer, which writes it")
    return Checkpoint(
        folder=folder,
        reader=reader,
        step=0,
        model=reader.description.model,
        objective=ObjectiveConfig(),
        sequence_length=reader.description.sequence_length,
        document_mask=DataConfig().document_mask,
        eos_id=reader.description.eos_id,
        tokenizer=tokenizer,
        tokenizer_sha256=_sha256(tokenizer),
    )


def _sha256(path: Folder) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
            model = Transformer(config, kernels=choose(KernelsConfig(), config, precision).kernels)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(reader.read(MASTER, name, 0, parameter.numel()).view_as(parameter))
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Folder) -> Tokenizer:
    """The tokenizer as the data were made with it: special tokens in a text are text, nothing is cut or padded."""
    tokenizer = Tokenizer.from_buffer(path.read_bytes())
    tokenizer.encode_special_tokens = True  # which means: as text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
