"""How well a model predicts a text: loss, perplexity and bits per byte.

Design choices:
- Sums of token losses over counts of targets, like the training loss (law 3), so the figure doesn't depend on batches.
- Bits per byte count the bytes of what was predicted, and so compare models with different tokenizers. Of a text file
  they are exact. Of shards they come from decoding the targets of each sample, where a character that two samples share
  counts a few bytes too many: about 0.1% at 1,024 tokens a sample, nothing in ASCII.
- Windows don't overlap: the first tokens of each have little context, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatrain import device
from megatrain.batch import IGNORE, Batch, Sequences
from megatrain.model.transformer import Transformer


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation.

    loss: nats a target. perplexity: exp(loss). bits_per_byte: None where no bytes were counted. targets: tokens
    predicted. bytes: of their text, UTF-8.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int
    bytes: int | None


def evaluate(
    model: Transformer, batches: Iterable[Batch], count_bytes: int | Callable[[Batch], int] | None = None
) -> Scores:
    """Scores of `model` on `batches`, which are on the CPU.

    count_bytes: the bytes of all targets' text, or a function that counts those of one batch.
    Raises ValueError where no batch has a target.
    """
    where = device.device()
    loss_sum = torch.zeros((), dtype=torch.float64, device=where)
    targets, size = 0, count_bytes if isinstance(count_bytes, int) else 0
    with torch.inference_mode():
        for batch in batches:
            targets += int((batch.targets != IGNORE).sum())
            if callable(count_bytes):
                size += count_bytes(batch)
            on_device = batch.to(where)
            x, positions, start = on_device.input_ids, on_device.positions, on_device.start
            losses = model(x, positions, start, on_device.end, on_device.targets, on_device.documents)
            loss_sum += losses.sum(dtype=torch.float64)
    if targets == 0:
        raise ValueError("nothing to predict")
    total = loss_sum.item()
    loss = total / targets
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total / math.log(2) / size if size else None,
        targets=targets,
        bytes=size or None,
    )


def decoded_bytes(tokenizer: Tokenizer) -> Callable[[Batch], int]:
    """Counts the UTF-8 bytes of the text of a batch's targets; special tokens have none."""

    def count(batch: Batch) -> int:
        rows = [[id_ for id_ in row if id_ != IGNORE] for row in batch.targets.tolist()]
        return sum(len(text.encode()) for text in tokenizer.decode_batch(rows, skip_special_tokens=True))

    return count


def text_sequences(ids: Tensor, sequence_length: int) -> Sequences:
    """One text as samples: windows of sequence_length + 1 ids that advance by sequence_length, the last one padded.

    ids: int32[N], N at least 2. Every id but the first is predicted once.
    """
    samples = -(-(len(ids) - 1) // sequence_length)
    padded = torch.zeros(samples * sequence_length + 1, dtype=torch.int32)
    padded[: len(ids)] = ids
    length = (len(ids) - sequence_length * torch.arange(samples, dtype=torch.int32)).clamp(max=sequence_length + 1)
    place = torch.arange(sequence_length + 1, dtype=torch.int32)
    return Sequences(
        ids=padded.unfold(0, sequence_length + 1, sequence_length),
        document=torch.where(place < length[:, None], 0, length[:, None]),
        length=length,
        source=torch.zeros(samples, dtype=torch.int32),
    )


def split(batch: Batch, micro_batch_size: int) -> Iterator[Batch]:
    """The batch in parts of micro_batch_size samples, the last one smaller."""
    for first in range(0, len(batch.input_ids), micro_batch_size):
        yield batch.map(lambda tensor: tensor[first : first + micro_batch_size])  # noqa: B023
