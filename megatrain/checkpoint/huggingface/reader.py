"""A Hugging Face folder as a ShardReader: any range of our parameters from its safetensors files, without a copy.

Design choices:
- It reads like a checkpoint, so import, evaluation and a run that begins with such a folder are code that is there.
- config.json and the files' headers are checked against each other when it is opened: tensors that are missing, left
  over or of another shape are errors before anything is read.
- Files are mapped into memory and rows are taken from where they lie. Only safetensors: weights in pickle aren't read,
  code in the folder isn't run, and an index can't name a file outside the folder (law 8).
- Masters are fp32, which holds bf16, fp16 and fp32 exactly (fp64 where the folder has it). Moments are zeros.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain.checkpoint.huggingface.config import read_config
from megatrain.checkpoint.huggingface.keys import read_json
from megatrain.checkpoint.huggingface.tensors import BLOCK_ELEMENTS, EMBEDDING, HEAD, HuggingFaceTensor, tensors
from megatrain.engines.ranges import MASTER
from megatrain.errors import InputError
from megatrain.model.spec import parameters

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Element types that are read, as a safetensors header says them."""

COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old folders that config.json says as well: the rotary frequencies."""


class HuggingFaceReader:
    """The weights of a Hugging Face folder, as a ShardReader: a fresh optimizer's state.

    description: what config.json says. Raises InputError where the folder isn't a model of ours, whole.
    """

    optimizer_step = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = read_config(folder)
        model = self.description.model
        self._parameters = {parameter.name: parameter for parameter in parameters(model)}
        self._tensors: dict[str, list[HuggingFaceTensor]] = {name: [] for name in self._parameters}
        for tensor in tensors(model):
            self._tensors[tensor.parameter.name].append(tensor)
        self._slices = _open(folder)
        self._check()

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`: 1-D, on the CPU, fp32 (or fp64, see above).

        state "master": the weights. Any other state: 0.
        """
        parameter = self._parameters[name]
        held = [DTYPES[self._slices[tensor.name].get_dtype()] for tensor in self._tensors[name]]
        dtype = reduce(torch.promote_types, held, torch.float32)
        if state != MASTER:
            return torch.zeros(stop - start, dtype=dtype)
        width = parameter.size // parameter.shape[0]
        first, last = start // width, -(-stop // width)
        rows = torch.empty(last - first, *parameter.shape[1:], dtype=dtype)
        for tensor in self._tensors[name]:
            self._fill(rows, first, tensor)
        return rows.view(-1)[start - first * width : stop - first * width]

    def _fill(self, out: Tensor, first: int, tensor: HuggingFaceTensor) -> None:
        """Copies what `tensor` holds of the parameter's rows from `first` on into `out`."""
        source = self._slices[tensor.name]
        position = 0
        for start, stop in tensor.rows:
            low, high = max(start, first), min(stop, first + len(out))
            if low < high:
                place = slice(position + low - start, position + high - start)
                part = source[:, place].t() if tensor.transposed else source[place]
                out[low - first : high - first].copy_(part)
            position += stop - start

    def _check(self) -> None:
        """The files hold the tensors of the model, and no others. Raises InputError naming the first that is wrong."""
        expected = {tensor.name: tensor for group in self._tensors.values() for tensor in group}
        missing = [name for name in expected if name not in self._slices]
        if missing:
            raise InputError(f"{self.folder}: {missing[0]} is missing, of {len(expected)} tensors {len(missing)}")
        for name, found in self._slices.items():
            if name in expected:
                shape = tuple(found.get_shape())
                if shape != expected[name].shape:
                    should = f"config.json says {list(expected[name].shape)}"
                    raise InputError(f"{self.folder}: {name} has the shape {list(shape)}, {should}")
                if found.get_dtype() not in DTYPES:
                    legal = ", ".join(DTYPES)
                    raise InputError(f"{self.folder}: {name} is in {found.get_dtype()}; legal: {legal}")
            elif name == HEAD:
                self._check_tied()
            elif not COMPUTED.fullmatch(name):
                raise InputError(f"{self.folder}: {name} is no tensor of the model that config.json describes")

    def _check_tied(self) -> None:
        """A head that is there all the same is the embedding. Raises InputError where it isn't."""
        head, embedding = self._slices[HEAD], self._slices[EMBEDDING]
        rows, width = embedding.get_shape()
        step = max(1, BLOCK_ELEMENTS // width)
        alike = (head.get_shape(), head.get_dtype()) == (embedding.get_shape(), embedding.get_dtype())
        same = alike and all(
            torch.equal(head[start : start + step], embedding[start : start + step]) for start in range(0, rows, step)
        )
        if not same:
            legal = "config.json says tie_word_embeddings=true; legal: false, or a folder without it"
            raise InputError(f"{self.folder}: {HEAD} isn't {EMBEDDING}, and {legal}")


def _open(folder: Path) -> dict[str, Any]:
    """What gives rows of each tensor of the folder's safetensors files, by the tensor's name."""
    found: dict[str, Any] = {}
    for path in _files(folder):
        try:
            handle: Any = safe_open(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118
                if name in found:
                    raise InputError(f"{path}: {name} is in another file too")
                found[name] = handle.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: no whole safetensors file ({error})") from None
    return found


def _files(folder: Path) -> list[Path]:
    """model.safetensors; or the files of the index; or where there is none, model*.safetensors."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        paths = sorted(folder.glob("model*.safetensors"))
        if not paths:
            pickled = next(folder.glob("*.bin"), None)
            why = f"; {pickled.name} is pickle, which isn't read: save the model as safetensors" if pickled else ""
            raise InputError(f"{folder}: no model*.safetensors in it{why}")
        return paths
    try:
        names = sorted({str(name) for name in read_json(folder / INDEX)["weight_map"].values()})
    except (KeyError, AttributeError):
        raise InputError(f"{folder / INDEX}: no index of safetensors files") from None
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{folder / INDEX}: {name} isn't in the folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing; {INDEX} names it")
    return [folder / name for name in names]
