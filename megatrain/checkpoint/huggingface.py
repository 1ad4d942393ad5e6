"""Any sharded checkpoint, through its ShardReader, as a folder that Hugging Face's transformers opens.

Design choices:
- Streaming: one parameter is in memory at a time, so the peak is about twice the largest tensor whatever the model.
  That is why safetensors files are written here and not by the library, which wants all tensors of a file at once.
- The architecture is the oldest that expresses the model (Llama, Mistral, Qwen3): the one most programs can read.
- Names and shapes in the files' headers come from running the same conversion on the meta device.
- config.json has the keys of the published models (rope_theta, rope_scaling, torch_dtype): every version of
  transformers and the inference servers read those; what its newest version writes is another model to an older one.
- tokenizer.json is the file that the data was made with, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatrain import device
from megatrain.config import ModelConfig, Norm, Precision
from megatrain.engines.ranges import MASTER, ShardReader
from megatrain.errors import GaveUp, InputError, bad_value
from megatrain.model.spec import ParameterSpec, head_dim, parameters
from megatrain.resilience.files import sync_folder, temporary_beside, write_synced

MAX_FILE_BYTES = 5_000_000_000
"""Bytes of tensors in one safetensors file."""

CALL_BYTES = 1 << 20
"""Bytes written at once: 4 MB calls into new files were measured 2x slower."""

HEADER_DTYPES = {Precision.bf16: "BF16", Precision.fp32: "F32", Precision.fp64: "F64"}
"""What weights are written in, as a safetensors header says it."""

_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
}
_FUSED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass
class _File:
    """A safetensors file to be: the parameters it holds, and its tensors' names and shapes in order."""

    parameters: list[ParameterSpec] = field(default_factory=list)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    elements: int = 0


def export(
    reader: ShardReader,
    config: ModelConfig,
    tokenizer_path: Path,
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
        "config.json": hugging_face_config(config, precision, sequence_length, eos_id),
        "generation_config.json": {"eos_token_id": eos_id, "pad_token_id": eos_id},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _check_tokenizer(config, tokenizer_path, eos_id),
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


def hugging_face_config(config: ModelConfig, precision: Precision, sequence_length: int, eos_id: int) -> dict[str, Any]:
    """The content of config.json. Raises InputError, naming the key, where no architecture expresses the model."""
    architecture = architecture_of(config)
    result: dict[str, Any] = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "torch_dtype": str(device.DTYPES[precision.value]).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": head_dim(config),
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": config.initializer_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }
    if (scaling := config.rope_scaling) is not None:
        result["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if architecture == "Qwen3":
        result |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return result


def architecture_of(config: ModelConfig) -> str:
    """Llama, Mistral or Qwen3. Raises InputError, naming the key, for a model that none of them expresses."""
    if config.norm != Norm.rms:
        raise bad_value("model.norm", config.norm.value, "Hugging Face's Llama, Mistral and Qwen3 have only rms")
    if config.qk_norm:
        if config.mlp_bias:
            raise bad_value("model.mlp_bias", True, "no Hugging Face architecture has it together with qk_norm")
        return "Qwen3"
    if config.sliding_window is not None:
        for key in ("attention_bias", "mlp_bias"):
            if getattr(config, key):
                raise bad_value(f"model.{key}", True, "Hugging Face's Mistral, for sliding_window, has no biases")
        return "Mistral"
    if config.hidden_size % config.num_heads:
        legal = f"has to divide model.hidden_size={config.hidden_size} for Hugging Face's Llama"
        raise bad_value("model.num_heads", config.num_heads, legal)
    return "Llama"


def to_hugging_face(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our parameters as Hugging Face stores it: views of `tensor` (whole, in its shape), by name.

    Row-parallel weights are turned to [out, in], and fused projections taken apart.
    """
    module, _, end = name.rpartition(".")
    if module in _TOP:
        return {f"{_TOP[module]}.{end}": tensor}
    _, number, module = module.split(".", 2)
    prefix = f"model.layers.{number}"
    if module in _LAYER:
        row_parallel = module in ("attention.out", "mlp.down") and end == "weight"
        return {f"{prefix}.{_LAYER[module]}.{end}": tensor.t() if row_parallel else tensor}
    if module == "mlp.gate_up":
        parts = tensor.chunk(2)
    else:
        groups = tensor.view(config.num_kv_heads, -1, head_dim(config), *tensor.shape[1:])
        parts = tuple(part.flatten(0, 2) for part in groups.tensor_split((-2, -1), dim=1))
    return {f"{prefix}.{part}.{end}": value for part, value in zip(_FUSED[module], parts, strict=True)}


def _write_weights(reader: ShardReader, config: ModelConfig, folder: Path, precision: Precision) -> None:
    """Writes model.safetensors, or several files and model.safetensors.index.json."""
    dtype = device.DTYPES[precision.value]
    files = _plan(config, MAX_FILE_BYTES // dtype.itemsize)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, file in zip(names, files, strict=True):
        with (folder / name).open("wb", buffering=CALL_BYTES) as handle:
            _write_header(handle, file, HEADER_DTYPES[precision], dtype.itemsize)
            for parameter in file.parameters:
                stored = reader.read(MASTER, parameter.name, 0, parameter.size).view(parameter.shape)
                for tensor in to_hugging_face(config, parameter.name, stored).values():
                    _write_tensor(handle, tensor.to(dtype).contiguous())
            handle.flush()
            os.fsync(handle.fileno())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(file.elements for file in files) * dtype.itemsize},
            "weight_map": {tensor: name for name, file in zip(names, files, strict=True) for tensor in file.tensors},
        }
        write_synced(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def _plan(config: ModelConfig, max_elements: int) -> list[_File]:
    """Which parameter goes into which file: in order, a new file where the next parameter doesn't fit."""
    files = [_File()]
    for parameter in parameters(config):
        if files[-1].elements and files[-1].elements + parameter.size > max_elements:
            files.append(_File())
        meta = torch.empty(parameter.shape, device="meta")
        pieces = to_hugging_face(config, parameter.name, meta)
        files[-1].parameters.append(parameter)
        files[-1].tensors |= {name: tuple(piece.shape) for name, piece in pieces.items()}
        files[-1].elements += parameter.size
    return files


def _write_header(handle: BinaryIO, file: _File, dtype: str, itemsize: int) -> None:
    """The beginning of a safetensors file: the length of a JSON object, and the object, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in file.tensors.items():
        end = offset + prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    handle.write(len(data).to_bytes(8, "little") + data)


def _write_tensor(handle: BinaryIO, tensor: Tensor) -> None:
    data = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), CALL_BYTES):
        handle.write(data[start : start + CALL_BYTES])


def _check_tokenizer(config: ModelConfig, path: Path, eos_id: int) -> str:
    """The EOS token's text. Raises InputError where the tokenizer can't be the model's."""
    tokenizer = Tokenizer.from_file(str(path))
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > config.vocab_size:
        raise InputError(f"{path}: {ids} ids, the model has model.vocab_size={config.vocab_size}")
    eos = tokenizer.id_to_token(eos_id)
    if eos is None:
        raise InputError(f"{path}: has no id {eos_id}, which ends the documents that the model was trained on")
    return eos
