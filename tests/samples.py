"""A small model and random batches for tests of training: documents, padding and unequal target counts."""

from __future__ import annotations

from dataclasses import fields

import torch

from megatrain.batch import IGNORE, Batch
from megatrain.config import ModelConfig, OptimConfig

MODEL = ModelConfig(
    name="test",
    vocab_size=131,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=96,
    qk_norm=True,
    initializer_std=0.05,
)
"""Uneven on purpose: 131 rows and odd norms don't divide among ranks."""

OPTIM = OptimConfig(learning_rate=1e-2, gradient_clip=0.5, warmup_steps=0, eps=1e-6)
"""A clip that is active at every step.

eps: at 1e-8 Adam's first steps make a whole step of the rounding error of an element whose gradient is nearly 0, and
one such element moves what law 4 compares by 2e-6.
"""


def batch(samples: int, sequence_length: int, seed: int, vocab_size: int = MODEL.vocab_size) -> Batch:
    """Samples of a learnable rule (a constant stride), in documents; later samples have ever fewer targets."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocab_size, (samples, 1), generator=generator)
    stride = torch.randint(1, 4, (samples, 1), generator=generator)
    ids = ((first + stride * torch.arange(sequence_length + 1)) % vocab_size).int()
    cut = torch.randint(1, sequence_length, (samples, 1), generator=generator)
    position = torch.arange(sequence_length).expand(samples, -1)
    start = torch.where(position < cut, 0, cut).int()
    targets = ids[:, 1:].clone()
    kept = torch.linspace(1.0, 0.2, samples)[:, None] * sequence_length
    targets[position >= kept] = IGNORE
    source = (torch.arange(samples) % 2).int()
    return Batch(ids[:, :-1].contiguous(), targets, (position - start).int(), start, None, source)


def empty_like(batch: Batch) -> Batch:
    """The same shapes without any target: what evens out ranks."""
    return Batch(
        batch.input_ids,
        torch.full_like(batch.targets, IGNORE),
        batch.positions,
        batch.start,
        batch.end,
        batch.source,
    )


def rows(batch: Batch, first: int, last: int) -> Batch:
    """Samples [first, last), those past the end without targets."""
    count = len(batch.input_ids)
    inside = batch.map(lambda tensor: tensor[first : min(last, count)])
    missing = last - max(first, min(last, count))
    if missing == 0:
        return inside
    filler = empty_like(batch.map(lambda tensor: tensor[:missing]))
    both = {
        field.name: None if value is None else torch.cat([value, getattr(filler, field.name)])
        for field in fields(Batch)
        for value in [getattr(inside, field.name)]
    }
    return Batch(**both)  # type: ignore[arg-type]
