"""Law 4's one process: a plain loop that every layout is held to. It knows the model and nothing of engines/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from megatrain.batch import Batch
from megatrain.config import KernelsConfig, ModelConfig, OptimConfig, Precision
from megatrain.device import DTYPES
from megatrain.model.choice import TORCH
from megatrain.model.initialization import InitialWeights
from megatrain.model.spec import Kind, parameters
from megatrain.model.transformer import Transformer


@dataclass
class Result:
    """Loss and gradient norm before clipping of each step, and the master weights after the last."""

    losses: list[float]
    gradient_norms: list[float]
    parameters: dict[str, Tensor]


def train(
    config: ModelConfig,
    optim: OptimConfig,
    batches: Sequence[Batch],
    learning_rates: Sequence[float],
    micro_batch_size: int,
    precision: Precision = Precision.fp32,
    seed: int = 0,
    kernels: KernelsConfig = TORCH,
) -> Result:
    """A step for each global batch. Masters and gradients are fp32 (fp64 at fp64), weights are the masters' cast."""
    model = Transformer(config, kernels=kernels).to(DTYPES[precision.value])
    weights = dict(model.named_parameters())
    initial = InitialWeights(config, seed)
    dtype = torch.promote_types(DTYPES[precision.value], torch.float32)
    masters = {n: initial.read("master", n, 0, w.numel()).view_as(w).to(dtype) for n, w in weights.items()}
    optimizer = adamw(config, optim, masters)
    result = Result([], [], masters)
    for batch, learning_rate in zip(batches, learning_rates, strict=True):
        for name, weight in weights.items():
            weight.data.copy_(masters[name])
        gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
        count = (batch.targets >= 0).sum()
        loss_sum = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(batch.input_ids), micro_batch_size):
            micro = batch.map(lambda tensor: tensor[first : first + micro_batch_size])  # noqa: B023
            losses = model(micro.input_ids, micro.positions, micro.start, micro.end, micro.targets)
            (losses.sum() / count.clamp(min=1)).backward()
            loss_sum += losses.detach().sum(dtype=torch.float64)
            for name, weight in weights.items():
                assert weight.grad is not None, name
                gradients[name] += weight.grad
                weight.grad = None
        for name, master in masters.items():
            master.grad = gradients[name]
        if count == 0:  # A step without targets is skipped.
            result.losses.append(0.0)
            result.gradient_norms.append(0.0)
            continue
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), optim.gradient_clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        result.losses.append((loss_sum / count).item())
        result.gradient_norms.append(norm.item())
    return result


def adamw(config: ModelConfig, optim: OptimConfig, masters: dict[str, Tensor]) -> torch.optim.AdamW:
    """AdamW with two groups: what weight decay takes and what it doesn't."""
    decayed = {Kind.norm: optim.decay_norms, Kind.bias: optim.decay_biases, Kind.embedding: optim.decay_embeddings}
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for spec in parameters(config):
        groups[decayed.get(spec.kind, True)].append(masters[spec.name])
    settings = [{"params": g, "weight_decay": optim.weight_decay if decay else 0.0} for decay, g in groups.items()]
    return torch.optim.AdamW(settings, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest |a - b| / max(1, |b|)."""
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def distance(a: Result, b: Result) -> float:
    """The larger difference of loss and of gradient norm."""
    return max(difference(a.losses, b.losses), difference(a.gradient_norms, b.gradient_norms))


def floor(train_with: Callable[[int], Result]) -> float:
    """Law 4's floor: how far runs of the reference at micro-batch sizes 1, 2, 4 and 8 are apart, at least 2.5e-7."""
    results = [train_with(size) for size in (1, 2, 4, 8)]
    return max(2.5e-7, *(distance(a, b) for a, b in combinations(results, 2)))
