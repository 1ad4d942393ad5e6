"""What tensor parallelism is without other ranks: nothing, or the plain operation; and on a GPU that isn't there."""

from __future__ import annotations

from itertools import chain

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain import device
from megatrain.batch import IGNORE
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
)
from tests import fake_gpu


@given(vocab_size=st.integers(1, 300), size=st.integers(1, 16), padding=st.integers(0, 40))
def test_the_ranks_hold_each_id_once(vocab_size: int, size: int, padding: int) -> None:
    rows = -(-vocab_size // size) + padding
    held = [vocabulary_range(rows, vocab_size, TensorParallel(rank, size)) for rank in range(size)]
    assert list(chain(*held)) == list(range(vocab_size))
    assert [ids.start for ids in held] == [rank * rows for rank in range(size)]
    assert all(len(ids) <= rows for ids in held)


def test_alone_nothing_is_added_to_the_graph() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    assert gather_sequence(weight, ALONE) is weight
    assert scatter_sequence(weight, ALONE) is weight
    assert summed_gradient(weight, None) is weight
    gradient = torch.ones(3, 4)
    sum_shared_rows(gradient, 1, None)
    assert torch.equal(gradient, torch.ones(3, 4))
    rows = embedding(torch.tensor([[2, 0]], dtype=torch.int32), weight, ALONE)
    assert rows.shape == (1, 2, 4)
    assert rows.grad_fn is not None
    assert rows.grad_fn.name() == "EmbeddingBackward0"


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_alone_the_cross_entropy_has_torch_s_bits(data: st.DataObject, dtype: torch.dtype) -> None:
    vocab_size, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99))
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1) | st.just(IGNORE), max_size=12))
    targets = torch.tensor(ids, dtype=torch.int32)
    numbers = torch.randn(len(ids), vocab_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours, theirs = numbers.clone().requires_grad_(), numbers.clone().requires_grad_()
    losses = cross_entropy(ours, targets, vocab_size, ALONE)
    wanted = F.cross_entropy(
        theirs.double() if dtype == torch.float64 else theirs.float(),
        targets.long(),
        ignore_index=IGNORE,
        reduction="none",
    )
    assert torch.equal(losses, wanted)
    torch.autograd.backward([losses.sum(), wanted.sum()])
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


VOCABULARY, ROWS, HIDDEN = 13, 4, 6


def everything(ids: Tensor, weight: Tensor, norm: Tensor, targets: Tensor, tensor: TensorParallel) -> Tensor:
    x = embedding(ids, weight, tensor) * summed_gradient(norm, tensor.group)
    x = scatter_sequence(gather_sequence(x, tensor), tensor)
    logits = gather_sequence(x, tensor) @ weight.mT
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), VOCABULARY, tensor)


def on_the_fake_gpu() -> list[str]:
    """Forwards and backwards of the first rank and the last: what the host waited for."""
    fake_gpu.start(4)
    with fake_gpu.tensors() as (_, host), torch.device(device.device()):
        for rank in (0, 3):
            tensor = TensorParallel(rank, 4, dist.group.WORLD, dist.group.WORLD)
            for dtype in (torch.bfloat16, torch.float32):
                weight = torch.ones(ROWS, HIDDEN, dtype=dtype, requires_grad=True)
                norm = torch.ones(HIDDEN, dtype=dtype, requires_grad=True)
                ids = torch.ones(2, 8, dtype=torch.int32)
                torch.autograd.backward(everything(ids, weight, norm, ids, tensor).sum())
                assert weight.grad is not None
                sum_shared_rows(weight.grad, 1, tensor.kv_group)
                assert weight.grad.dtype == dtype
        return host.waits


def test_the_host_never_waits_for_the_gpu() -> None:
    assert fake_gpu.run(on_the_fake_gpu) == []
