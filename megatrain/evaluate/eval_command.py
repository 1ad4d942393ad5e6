"""`megatrain eval checkpoint=C data.path=DIR` or `text=FILE`: loss, perplexity and bits per byte, one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatrain import objectives
from megatrain.batch import Batch
from megatrain.command_config import EvalConfig
from megatrain.data.format import HELD_OUT
from megatrain.data.loader import held_out_batches
from megatrain.data.samples import open_sources
from megatrain.data_config import DataConfig
from megatrain.errors import DONE, InputError, bad_value
from megatrain.evaluate.loading import Checkpoint, attempt, load_model, load_tokenizer
from megatrain.evaluate.perplexity import decoded_bytes, evaluate, split, text_sequences
from megatrain.model.transformer import Transformer
from megatrain.resilience.files import write_whole


@dataclass(frozen=True)
class _Task:
    """What is evaluated: batches of `samples` samples in all, and their bytes as perplexity.evaluate takes them."""

    batches: Iterable[Batch]
    samples: int
    sequence_length: int
    count_bytes: int | Callable[[Batch], int]


def run(config: EvalConfig) -> int:
    """Prints a table, and writes it to `output`; the exit code. Raises InputError for what can't be evaluated."""
    _check(config)
    checkpoint, task, model = attempt(config.checkpoint, partial(_prepare, config))
    console = Console(stderr=True)
    steps = math.ceil(task.samples / config.micro_batch_size)
    batches = track(task.batches, "evaluating", total=steps, console=console, disable=not console.is_terminal)
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "model": checkpoint.model.name,
        "evaluated": config.text or config.data.path,
        "samples": task.samples,
        "sequence_length": task.sequence_length,
        "precision": config.precision.value,
        **asdict(evaluate(model, batches, task.count_bytes)),
    }
    _print(result)
    if config.output:
        write_whole(Path(config.output), json.dumps(result, indent=2).encode())
    return DONE


def _check(config: EvalConfig) -> None:
    if (config.text is None) == (config.data.path is None):
        raise InputError("data.path or text: give one of them, a folder that `megatrain prep` wrote or a text file")
    for key in ("sequence_length", "micro_batch_size", "max_samples"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise bad_value(key, value, "has to be at least 1")
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise bad_value("output", config.output, "its folder doesn't exist")


def _prepare(config: EvalConfig, checkpoint: Checkpoint) -> tuple[Checkpoint, _Task, Transformer]:
    """The checkpoint, what is evaluated, and the model."""
    length = config.sequence_length or checkpoint.sequence_length
    task = _text_task(config, checkpoint, length) if config.text else _data_task(config, checkpoint, length)
    return checkpoint, task, load_model(checkpoint.reader, checkpoint.model, config.precision)


def _data_task(config: EvalConfig, checkpoint: Checkpoint, length: int) -> _Task:
    """The held-out split of a set."""
    sources = open_sources(DataConfig(path=config.data.path, index_path=config.data.index_path), length, HELD_OUT)
    if sources[0].manifest.tokenizer_sha256 != checkpoint.tokenizer_sha256:
        raise bad_value("data.path", config.data.path, f"made with another tokenizer than {checkpoint.folder}'s")
    objective = objectives.build(checkpoint.objective, checkpoint.document_mask, documents=True)
    samples = min(config.max_samples or sources[0].index.samples, sources[0].index.samples)
    batches = held_out_batches(sources, objective, samples=samples, micro_batch_size=config.micro_batch_size)
    return _Task(batches, samples, length, decoded_bytes(load_tokenizer(checkpoint.tokenizer_path)))


def _text_task(config: EvalConfig, checkpoint: Checkpoint, length: int) -> _Task:
    """One text file."""
    try:
        text = Path(str(config.text)).read_text(encoding="utf-8")
    except OSError as error:
        raise bad_value("text", config.text, error.strerror or "can't be read") from None
    except UnicodeDecodeError as error:
        raise bad_value("text", config.text, f"not UTF-8 (byte {error.start})") from None
    encoding = load_tokenizer(checkpoint.tokenizer_path).encode(text, add_special_tokens=False)
    ids = torch.tensor(encoding.ids, dtype=torch.int32)
    if config.max_samples:
        ids = ids[: config.max_samples * length + 1]
    if len(ids) < 2:
        raise bad_value("text", config.text, f"has {len(ids)} tokens; at least 2 are needed to predict one")
    predicted = text[encoding.offsets[0][1] : encoding.offsets[len(ids) - 1][1]]
    objective = objectives.build(checkpoint.objective, checkpoint.document_mask, documents=True)
    # Of a text shorter than a sample nothing is padded: a model may be made for a hundred thousand tokens.
    batch = objective(text_sequences(ids, min(length, len(ids) - 1)))
    return _Task(split(batch, config.micro_batch_size), len(batch.input_ids), length, len(predicted.encode()))


def _print(result: dict[str, Any]) -> None:
    table = Table("what", "value", show_header=False)
    for key, value in result.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), shown)
    Console().print(table)
