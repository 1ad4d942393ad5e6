"""The transformer: transformers' logits, documents apart, losses of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.batch import IGNORE, Batch
from megatrain.config import ModelConfig, Norm, RopeScaling
from megatrain.model.modules import linear
from megatrain.model.transformer import Transformer
from tests import samples
from tests.huggingface import counterpart

LLAMA = replace(samples.MODEL, qk_norm=False, initializer_std=0.2)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose every parameter is random, norms and biases included."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config).to(dtype)
    for parameter in model.parameters():
        mean = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, config.initializer_std, generator=generator)
    return model


def plain(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and start of whole rows."""
    return ids, torch.arange(ids.shape[1], dtype=torch.int32).expand_as(ids), torch.zeros_like(ids)


def losses(model: Transformer, batch: Batch) -> Tensor:
    result: Tensor = model(batch.input_ids, batch.positions, batch.start, batch.end, batch.targets)
    return result


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        replace(LLAMA, num_kv_heads=4, tie_embeddings=True),
        replace(LLAMA, num_kv_heads=1, head_dim=24),
        replace(LLAMA, rope_theta=100.0, rope_scaling=RopeScaling(original_context=32)),
        replace(LLAMA, attention_bias=True),
        replace(LLAMA, attention_bias=True, attention_out_bias=False),
        replace(LLAMA, mlp_bias=True, norm_eps=1e-3),
        replace(LLAMA, sliding_window=5),
        replace(LLAMA, qk_norm=True, attention_bias=True),
        replace(LLAMA, qk_norm=True, sliding_window=7),
    ],
    ids=[
        "GQA",
        "tied",
        "head_dim",
        "rope scaling",
        "attention bias",
        "Qwen2",
        "mlp bias",
        "Mistral",
        "Qwen3",
        "Qwen3 with window",
    ],
)
def test_logits_equal_those_of_transformers(config: ModelConfig) -> None:
    model = random_model(config)
    ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    with torch.no_grad():
        logits = model(*plain(ids))
        expected = counterpart(config, model, sequence_length=40)(ids.long()).logits
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents_are_as_each_alone(window: int | None) -> None:
    config = replace(samples.MODEL, sliding_window=window, norm=Norm.layer)
    model = random_model(config, torch.float64)
    packed = samples.batch(samples=3, sequence_length=16, seed=2)
    together = losses(model, packed)
    for row in range(3):
        cut = int(packed.start[row].max())
        for part in (slice(0, cut), slice(cut, 16)):
            ids, targets = packed.input_ids[row : row + 1, part], packed.targets[row : row + 1, part]
            alone = model(*plain(ids), None, targets)
            torch.testing.assert_close(together[row : row + 1, part], alone, rtol=0, atol=1e-12)


def test_padding_changes_nothing() -> None:
    model = random_model(samples.MODEL, torch.float64)
    ids, positions, start = plain(torch.arange(10, dtype=torch.int32)[None])
    padded = (F.pad(ids, (0, 6), value=5), F.pad(positions, (0, 6)), F.pad(start, (0, 6), value=10))
    with torch.no_grad():
        torch.testing.assert_close(model(*padded)[:, :10], model(ids, positions, start), rtol=0, atol=1e-12)


def test_bidirectional_attention_sees_what_comes_later() -> None:
    model = random_model(samples.MODEL, torch.float64)
    ids, positions, start = plain(torch.arange(8, dtype=torch.int32)[None])
    changed = ids.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        end = torch.full_like(start, 8)
        assert torch.equal(model(ids, positions, start)[:, :-1], model(changed, positions, start)[:, :-1])
        assert (model(ids, positions, start, end) != model(changed, positions, start, end)).all()


@pytest.mark.parametrize(
    ("weights", "loss"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_losses_are_those_of_tokens(weights: torch.dtype, loss: torch.dtype) -> None:
    model = random_model(samples.MODEL, weights)
    batch = samples.batch(samples=2, sequence_length=12, seed=0)
    result = losses(model, batch)
    logits = model(batch.input_ids, batch.positions, batch.start)
    assert (result.dtype, logits.dtype) == (loss, weights)
    assert (result[batch.targets == IGNORE] == 0).all()
    kept = batch.targets != IGNORE
    chosen = logits.to(loss).log_softmax(-1)[kept].gather(1, batch.targets[kept].long()[:, None])[:, 0]
    torch.testing.assert_close(result[kept], -chosen)


def test_every_parameter_is_used_by_its_own_module() -> None:
    """What ZeRO-3 and FSDP rely on: outside its module's forward a parameter may be gone."""
    model = random_model(replace(samples.MODEL, norm=Norm.layer, attention_bias=True, tie_embeddings=True))
    used = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: used.update(module.parameters(recurse=False)))
    batch = samples.batch(samples=2, sequence_length=12, seed=0)
    losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    assert used == set(model.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_view_of_a_weight_is_kept_for_backward(dtype: torch.dtype) -> None:
    """What lets ZeRO-3 free a weight after its forward: a saved view would hold its memory until backward."""
    model = random_model(replace(samples.MODEL, attention_bias=True, mlp_bias=True), dtype)
    owners = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        owner = owners.get(tensor.untyped_storage().data_ptr())
        if owner is not None:
            kept.append(tensor is owner)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses(model, samples.batch(samples=2, sequence_length=12, seed=0))
    assert len(kept) > 10
    assert all(kept)


def test_linear_has_the_gradients_of_autograd() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x, weight))
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    frozen = linear(x, weight.detach())
    frozen.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
