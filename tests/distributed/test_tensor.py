"""What ranks that share matrices say to each other, against one process; and that they say no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from megatrain.batch import IGNORE
from megatrain.kernels.linear_cross_entropy.op import losses as losses_of
from megatrain.kernels.linear_cross_entropy.reference import of_logits
from megatrain.parallel.tensor import (
    ALONE,
    TensorParallel,
    cross_entropy,
    embedding,
    gather_sequence,
    scatter_sequence,
    sum_shared_rows,
    summed_gradient,
    vocabulary_range,
    whole_vocabulary,
)
from tests.distributed import checking
from tests.distributed.pool import Pool

pytestmark = pytest.mark.distributed

SIZES = (2, 4)
VOCABULARY = 131
KV_HEADS, QUERIES, HIDDEN = 2, 12, 6
"""Queries are outputs for each key-value head, divisible among the ranks that share it."""

TINY = 1e-14

Weights = dict[str, Tensor]


def place() -> TensorParallel:
    """Of this rank among all of the task; two ranks share a key-value head where there are four."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_subgroups(2)[0] if size == 2 * KV_HEADS else None  # type: ignore[no-untyped-call]
    return TensorParallel(rank, size, dist.group.WORLD, pair)


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, relative to b's largest element."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@contextmanager
def collectives() -> Iterator[list[str]]:
    """What this rank calls within, such as `all_reduce sum float64 12`."""
    assert checking.checker is not None
    before, seen = len(checking.checker.calls), list[str]()
    yield seen
    seen += [call.what for call in checking.checker.calls[before:]]


def own_positions(x: Tensor, tensor: TensorParallel) -> Tensor:
    return x.chunk(tensor.size, dim=1)[tensor.rank].clone()


# Sequences


def sequences() -> None:
    tensor = place()
    for shape in ((1, 8, 5), (3, 4, 2, 3), (2, 12)):
        elements = random(*shape, seed=0).numel()
        whole, parts = random(*shape, seed=1), random(tensor.size, *shape, seed=2)

        x = own_positions(whole, tensor).requires_grad_()
        with collectives() as seen:
            gathered = gather_sequence(x, tensor)
            torch.autograd.backward((gathered * parts[tensor.rank]).sum())
        assert torch.equal(gathered, whole)
        assert x.grad is not None
        assert difference(x.grad, own_positions(parts.sum(0), tensor)) <= TINY
        # As the checks count: a gather's input, a scatter's output.
        share = elements // tensor.size
        assert seen == [f"all_gather float64 {share}", f"reduce_scatter sum float64 {share}"]

        x = parts[tensor.rank].clone().requires_grad_()
        with collectives() as seen:
            scattered = scatter_sequence(x, tensor)
            torch.autograd.backward((scattered * own_positions(whole, tensor)).sum())
        assert difference(scattered, own_positions(parts.sum(0), tensor)) <= TINY
        assert x.grad is not None
        assert torch.equal(x.grad, whole)
        assert seen == [f"reduce_scatter sum float64 {share}", f"all_gather float64 {share}"]


@pytest.mark.parametrize("ranks", SIZES)
def test_sequences_are_gathered_and_scattered(pool: Pool, ranks: int) -> None:
    pool.run(sequences, ranks=ranks)


def strided() -> None:
    """Inputs and gradients as they come out of transpositions and sums: the checks refuse what isn't contiguous."""
    tensor = place()
    for batch in (1, 4):
        whole = random(6, 8, batch, seed=3).transpose(0, 2)  # [batch, 8, 6]
        x = whole.chunk(tensor.size, dim=1)[tensor.rank].detach().requires_grad_()
        gathered = gather_sequence(x, tensor)
        assert torch.equal(gathered, whole)
        torch.autograd.backward(scatter_sequence(gathered, tensor).sum())  # Of an expanded gradient of ones.
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full_like(x, tensor.size))
        assert torch.equal(scatter_sequence(whole, tensor), tensor.size * own_positions(whole, tensor))
    with pytest.raises(RuntimeError, match="unflatten"):
        scatter_sequence(random(2, 7, seed=0), tensor)


def test_any_strides_do(pool: Pool) -> None:
    pool.run(strided, ranks=2)


def shared_gradients() -> list[list[float]]:
    """Another node gets the same gradient tensor as summed_gradient's, after it, and must not see the sum."""
    found = []
    transposed = (dist.get_rank() + 1) * torch.tensor([[1.0, 3.0], [2.0, 4.0]]).mT
    for gradient in (transposed, transposed.contiguous()):
        weight, other = (torch.zeros(2, 2, requires_grad=True) for _ in range(2))
        doubled = 2 * other
        torch.autograd.backward(summed_gradient(weight, dist.group.WORLD) + doubled, gradient)
        found += [x.grad.flatten().tolist() for x in (weight, other) if x.grad is not None]
    return found


def test_only_the_weight_named_has_its_gradient_summed(pool: Pool) -> None:
    ranks = pool.run(shared_gradients, ranks=2)
    assert ranks[0] == [[3.0, 6.0, 9.0, 12.0], [2.0, 4.0, 6.0, 8.0]] * 2
    assert ranks[1] == [[3.0, 6.0, 9.0, 12.0], [4.0, 8.0, 12.0, 16.0]] * 2


# All of them in a model


def weights() -> Weights:
    """Of the whole model. projection: [KV_HEADS, QUERIES + 1, HIDDEN], the key's row after the queries'."""
    return {
        "embedding": random(VOCABULARY, HIDDEN, seed=10),
        "norm": random(HIDDEN, seed=11),
        "projection": random(KV_HEADS, QUERIES + 1, HIDDEN, seed=12),
        "out": random(KV_HEADS * QUERIES, HIDDEN, seed=13),
        "bias": random(HIDDEN, seed=14),
    }


def cut(whole: Weights, tensor: TensorParallel) -> Weights:
    """A rank's part of the weights, or of their gradients."""
    rows = -(-VOCABULARY // tensor.size)
    padded = F.pad(whole["embedding"], (0, 0, 0, rows * tensor.size - VOCABULARY))
    head, share = divmod(tensor.rank, tensor.size // KV_HEADS)
    queries = whole["projection"][head, :-1].chunk(tensor.size // KV_HEADS)[share]
    return {
        "embedding": padded[tensor.rank * rows :][:rows],
        "norm": whole["norm"],
        "projection": torch.cat([queries, whole["projection"][head, -1:]]).unsqueeze(0),
        "out": whole["out"].chunk(tensor.size)[tensor.rank],
        "bias": whole["bias"],
    }


def tiny_model(ids: Tensor, targets: Tensor, w: Weights, tensor: TensorParallel) -> Tensor:
    """Losses [B, S] of a residual stream, its norm, a product in between that mixes positions, and a tied head."""
    x = embedding(ids, w["embedding"], tensor)
    normed = x * summed_gradient(w["norm"], tensor.group)
    projected = gather_sequence(normed, tensor) @ w["projection"].flatten(0, 1).mT
    queries, keys = torch.unflatten(projected, -1, w["projection"].shape[:2]).tensor_split([-1], dim=-1)
    mixed = (queries * keys.cumsum(1)).flatten(-2).tanh()
    x = x + scatter_sequence(mixed @ w["out"], tensor) + summed_gradient(w["bias"], tensor.group)
    logits = gather_sequence(x, tensor) @ w["embedding"].mT
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), VOCABULARY, tensor).view_as(targets)


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """ids and targets int32[3, 8], the first and last of the vocabulary among them, and what the losses count."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(VOCABULARY, (2, 3, 8), generator=generator, dtype=torch.int32)
    ids[0, :2] = targets[0, 2:4] = torch.tensor([0, VOCABULARY - 1])
    targets[1, ::3] = IGNORE
    return ids, targets, random(3, 8, seed=20)


Function = Callable[[Tensor, Tensor, Weights, TensorParallel], Tensor]


def gradients(function: Function, part: Weights, tensor: TensorParallel) -> tuple[Tensor, Weights]:
    """Losses, and the gradients of their weighted sum."""
    part = {name: weight.clone().requires_grad_() for name, weight in part.items()}
    ids, targets, counts = samples()
    losses = function(ids, targets, part, tensor)
    torch.autograd.backward((losses * counts).sum())
    of_weights = {name: weight.grad for name, weight in part.items() if weight.grad is not None}
    sum_shared_rows(of_weights["projection"][0], QUERIES * KV_HEADS // tensor.size, tensor.kv_group)
    return losses.detach(), of_weights


def recomputed(ids: Tensor, targets: Tensor, w: Weights, tensor: TensorParallel) -> Tensor:
    """With activation checkpointing."""
    losses: Tensor = checkpoint(tiny_model, ids, targets, w, tensor, use_reentrant=False)
    return losses


def in_a_model() -> tuple[Tensor, Tensor, dict[str, float], list[str]]:
    """Losses, one process's losses, the differences of gradients from one process's, and the collectives."""
    tensor = place()
    reference, of_reference = gradients(tiny_model, weights(), ALONE)
    part = cut(weights(), tensor)
    with collectives() as seen:
        losses, of_weights = gradients(tiny_model, part, tensor)
    wanted = cut(of_reference, tensor)
    assert set(of_weights) == set(part)

    again, of_again = gradients(recomputed, part, tensor)
    assert torch.equal(again, losses)
    assert all(torch.equal(of_again[name], gradient) for name, gradient in of_weights.items())
    with torch.no_grad():
        ids, targets, _ = samples()
        assert torch.equal(tiny_model(ids, targets, part, tensor), losses)
    differences = {name: difference(gradient, wanted[name]) for name, gradient in of_weights.items()}
    return losses, reference, differences, seen


@pytest.mark.parametrize("ranks", SIZES)
def test_a_model_of_them_is_the_model_of_one_process(pool: Pool, ranks: int) -> None:
    tokens = 3 * 8
    share = tokens * HIDDEN // ranks
    for losses, reference, differences, seen in pool.run(in_a_model, ranks=ranks):
        assert difference(losses, reference) <= TINY
        assert max(differences.values()) <= TINY, differences
        assert seen == [
            f"reduce_scatter sum float64 {share}",  # The embedding,
            f"all_gather float64 {share}",  # the projection,
            f"reduce_scatter sum float64 {share}",  # the row-parallel product,
            f"all_gather float64 {share}",  # and the head.
            f"all_reduce max float64 {tokens}",
            f"all_reduce sum float64 {2 * tokens}",
            f"reduce_scatter sum float64 {share}",  # The same, backwards.
            f"all_reduce sum float64 {HIDDEN}",  # The bias.
            f"all_gather float64 {share}",
            f"reduce_scatter sum float64 {share}",
            f"all_reduce sum float64 {HIDDEN}",  # The norm.
            f"all_gather float64 {share}",
            *([f"all_reduce sum float64 {HIDDEN}"] if ranks > KV_HEADS else []),  # The shared key.
        ]


# The cross entropy


def columns(logits: Tensor, tensor: TensorParallel, width: int) -> Tensor:
    """A rank's `width` columns; what is past the vocabulary is NaN, which nothing may see."""
    padded = F.pad(logits, (0, width * tensor.size - logits.shape[1]), value=torch.nan)
    return padded[:, tensor.rank * width :][:, :width].clone()


def targets_of(rows: int, vocab_size: int) -> Tensor:
    """int32[rows] with the ends of the vocabulary, and IGNORE."""
    targets = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    targets[:3] = torch.tensor([0, vocab_size - 1, IGNORE])
    return targets


def by_parts(logits: Tensor, targets: Tensor, vocab_size: int, tensor: TensorParallel) -> Tensor:
    """The same from what is known of each rank's part of the vocabulary."""
    ids = vocabulary_range(logits.shape[1], vocab_size, tensor)
    parts = of_logits(logits, targets, ids.start, len(ids))
    return losses_of(*whole_vocabulary(*parts, tensor), targets, IGNORE)


Losses = Callable[[Tensor, Tensor, int, TensorParallel], Tensor]


def both(
    logits: Tensor, targets: Tensor, width: int, function: Losses = cross_entropy
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and this rank's gradient of the logits; and the same of one process."""
    tensor, counts = place(), random(len(logits), seed=6)
    whole = logits.clone().requires_grad_()
    wanted = F.cross_entropy(
        whole.to(torch.promote_types(whole.dtype, torch.float32)), targets.long(), ignore_index=IGNORE, reduction="none"
    )
    torch.autograd.backward((wanted * counts).sum())
    part = columns(logits, tensor, width).requires_grad_()
    with collectives() as seen:
        losses = function(part, targets, logits.shape[1], tensor)
    kind = str(losses.dtype).removeprefix("torch.")
    assert seen == [f"all_reduce max {kind} {len(logits)}", f"all_reduce sum {kind} {2 * len(logits)}"]
    with collectives() as seen:
        torch.autograd.backward((losses * counts).sum())
    assert seen == []
    assert part.grad is not None
    assert whole.grad is not None
    of_whole = columns(whole.grad, tensor, width).nan_to_num(0.0)  # No gradient where there is padding.
    return losses.detach(), wanted.detach(), part.grad, of_whole


def widths() -> list[Tensor]:
    """Vocabularies that ranks share evenly, unevenly, and so that some have nothing."""
    found = []
    size = dist.get_world_size()
    for vocab_size, width in ((VOCABULARY, -(-VOCABULARY // size)), (VOCABULARY, 140), (5, 4), (1, 3), (4 * size, 4)):
        ignored = torch.full((9,), IGNORE)
        for function, targets in product((cross_entropy, by_parts), (targets_of(9, vocab_size), ignored)):
            losses, wanted, gradient, of_whole = both(random(9, vocab_size, seed=7), targets, width, function)
            torch.testing.assert_close(losses, wanted, rtol=TINY, atol=TINY)
            torch.testing.assert_close(gradient, of_whole, rtol=TINY, atol=TINY)
            assert torch.equal(losses[targets == IGNORE], losses.new_zeros(int((targets == IGNORE).sum())))
            found.append(losses)
    return found


@pytest.mark.parametrize("ranks", SIZES)
def test_every_division_of_a_vocabulary_gives_the_same_losses(pool: Pool, ranks: int) -> None:
    first, *others = pool.run(widths, ranks=ranks)
    assert len(first) == 20
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), "other bits on another rank"


def dtypes() -> list[Tensor]:
    found = []
    for scale in (1.0, 1e4, 1e30):
        for dtype, closeness in ((torch.float64, TINY), (torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
            logits = (scale * random(16, VOCABULARY, seed=8)).to(dtype)
            losses, wanted, gradient, of_whole = both(logits, targets_of(16, VOCABULARY), 40)
            assert losses.dtype == wanted.dtype == torch.promote_types(dtype, torch.float32)
            assert gradient.dtype == dtype
            assert losses.isfinite().all()
            torch.testing.assert_close(losses, wanted, rtol=min(closeness, 2e-6), atol=2e-6)
            torch.testing.assert_close(gradient, of_whole, rtol=closeness, atol=min(closeness, 2e-6))
            found.append(losses)
    return found


def test_large_logits_and_all_dtypes(pool: Pool) -> None:
    first, *others = pool.run(dtypes, ranks=4)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def not_a_number() -> list[bool]:
    tensor = place()
    logits = torch.zeros(3, 4)
    if tensor.rank == 1:
        logits[1, 2] = torch.nan
    return cross_entropy(logits, torch.tensor([0, 1, 7]), 8, tensor).isnan().tolist()


def test_a_rank_s_nan_is_a_nan_on_all(pool: Pool) -> None:
    assert pool.run(not_a_number, ranks=2) == [[False, True, False]] * 2


def differentiated() -> None:
    """By gradcheck, on all ranks in step: each part of the gradient comes from one of them."""
    tensor, width, targets = place(), 4, torch.tensor([6, 0, IGNORE])

    def losses(whole: Tensor) -> Tensor:
        part = F.pad(summed_gradient(whole, tensor.group), (0, width * tensor.size - whole.shape[1]))
        chosen = part[:, tensor.rank * width :][:, :width]
        # gradcheck goes back through a graph many times, and cross_entropy's is used up by the first.
        result: Tensor = checkpoint(cross_entropy, chosen, targets, 7, tensor, use_reentrant=False)
        return result

    logits = random(3, 7, seed=9).requires_grad_()
    assert gradcheck(losses, (logits,))
    once = cross_entropy(logits[:, :4], targets, 7, tensor).sum()
    torch.autograd.backward(once, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(once)


def test_the_gradient_is_the_derivative_and_is_taken_once(pool: Pool) -> None:
    pool.run(differentiated, ranks=2)
