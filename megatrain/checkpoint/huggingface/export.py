"""Any sharded checkpoint, through its ShardReader, as a folder that Hugging Face's transformers opens.

Design choices:
- Streaming: in memory are one tensor as it is written and one block as it is read, whatever the model. That is why
  safetensors files are written here and not by the library, which wants all tensors of a file at once.
- tokenizer.json is the file that the data was made with, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatrain import device
from megatrain.checkpoint.huggingface.config import CONFIG, GENERATION_CONFIG, hugging_face_config
from megatrain.checkpoint.huggingface.tensors import HuggingFaceTensor, assemble, tensors
from megatrain.checkpoint.huggingface.tokenizer import check_tokenizer
from megatrain.config import ModelConfig, Precision
from megatrain.engines.ranges import ShardReader
from megatrain.errors import GaveUp, bad_value
from megatrain.resilience.files import sync_folder, temporary_beside, write_synced
from megatrain.storage import Folder

MAX_FILE_BYTES = 5_000_000_000
"""Bytes of tensors in one safetensors file."""

CALL_BYTES = 1 << 20
"""Bytes written at once: 4 MB calls into new files were measured 2x slower."""

HEADER_DTYPES = {Precision.bf16: "BF16", Precision.fp32: "F32", Precision.fp64: "F64"}
"""What weights are written in, as a safetensors header says it."""


def export(
    reader: ShardReader,
    config: ModelConfig,
    tokenizer_path: Folder,
    output: Path,
    precision: Precision,
    sequence_length: int,
    eos_id: int,
) -> None:
    """Writes the Hugging Face folder `output`: weights, config.json, generation_config.json and the tokenizer's files.

    tokenizer_path: a tokenizer.json. sequence_length: what config.json calls max_position_embeddings.
    Raises InputError where `output` exists and isn't empty, where no architecture of transformers expresses the model,
    or where the tokenizer has ids that the model lacks. The folder appears whole or not at all.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise bad_value("output", output, "exists; give a new or empty folder")
    settings: dict[str, dict[str, Any]] = {
        CONFIG: hugging_face_config(config, precision, sequence_length, eos_id),
        GENERATION_CONFIG: {"eos_token_id": eos_id, "pad_token_id": eos_id},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": check_tokenizer(tokenizer_path, config, eos_id),
            "model_max_length": sequence_length,
            "clean_up_tokenization_spaces": False,
        },
    }
    temporary = temporary_beside(output)
    try:
        temporary.mkdir(parents=True)
        _write_weights(reader, config, temporary, precision)
        for name, content in settings.items():
            write_synced(temporary / name, json.dumps(content, indent=2).encode())
        write_synced(temporary / "tokenizer.json", tokenizer_path.read_bytes())
        sync_folder(temporary)
        temporary.replace(output)
        sync_folder(output.parent)
    except OSError as error:
        raise GaveUp(f"{output}: not exported: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(reader: ShardReader, config: ModelConfig, folder: Path, precision: Precision) -> None:
    """Writes model.safetensors, or several files and model.safetensors.index.json."""
    dtype = device.DTYPES[precision.value]
    files = _plan(config, MAX_FILE_BYTES // dtype.itemsize)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, content in zip(names, files, strict=True):
        with (folder / name).open("wb", buffering=CALL_BYTES) as handle:
            _write_header(handle, content, HEADER_DTYPES[precision], dtype.itemsize)
            for tensor in content:
                _write_tensor(handle, assemble(reader, tensor, dtype))
            handle.flush()
            os.fsync(handle.fileno())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for content in files for tensor in content) * dtype.itemsize},
            "weight_map": {tensor.name: name for name, content in zip(names, files, strict=True) for tensor in content},
        }
        write_synced(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def _plan(config: ModelConfig, max_elements: int) -> list[list[HuggingFaceTensor]]:
    """The tensors of each file: in order, a new file where the next tensor doesn't fit."""
    files: list[list[HuggingFaceTensor]] = [[]]
    elements = 0
    for tensor in tensors(config):
        if files[-1] and elements + tensor.size > max_elements:
            files.append([])
            elements = 0
        files[-1].append(tensor)
        elements += tensor.size
    return files


def _write_header(handle: BinaryIO, content: Sequence[HuggingFaceTensor], dtype: str, itemsize: int) -> None:
    """The beginning of a safetensors file: the length of a JSON object, and the object, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in content:
        end = offset + tensor.size * itemsize
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    handle.write(len(data).to_bytes(8, "little") + data)


def _write_tensor(handle: BinaryIO, tensor: Tensor) -> None:
    data = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), CALL_BYTES):
        handle.write(data[start : start + CALL_BYTES])
