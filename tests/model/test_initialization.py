"""Initial weights: the same bits in any cut, and the distribution that was asked for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config import Norm
from megatrain.model.initialization import BLOCK, InitialWeights, normal
from tests.samples import MODEL

WHOLE = normal(3, "layers.0.mlp.down.weight", 0, 3 * BLOCK)


@given(st.lists(st.integers(0, 3 * BLOCK), min_size=2, max_size=5).map(sorted))
@settings(max_examples=50, deadline=None)
def test_any_range_has_the_bits_of_the_whole(cuts: list[int]) -> None:
    for start, stop in pairwise(cuts):
        assert np.array_equal(normal(3, "layers.0.mlp.down.weight", start, stop), WHOLE[start:stop])


def test_it_is_a_standard_normal() -> None:
    x = np.sort(normal(0, "a", 0, 1_000_000).astype(np.float64))
    assert abs(x.mean()) < 4e-3
    assert abs(x.std() - 1) < 3e-3
    quantiles = x[[1_350, 22_750, 158_655, 500_000, 841_345, 977_250, 998_650]]
    assert np.allclose(quantiles, [-3, -2, -1, 0, 1, 2, 3], atol=0.05)
    y = normal(0, "a", 0, 1_000_000)
    for lag in (1, 2, BLOCK):
        assert abs(np.corrcoef(y[:-lag], y[lag:])[0, 1]) < 4e-3


def test_seed_and_name_make_other_numbers() -> None:
    a, b, c = normal(0, "a", 0, 10_000), normal(1, "a", 0, 10_000), normal(0, "b", 0, 10_000)
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.05
        assert (x != y).all()


def test_the_numbers_stay_what_they_are() -> None:
    """A run continued by a later version, or made again, begins with the same weights."""
    assert np.allclose(normal(0, "a", 0, 4), [-0.2441581, -0.3118400, -0.5480121, -0.5616834], atol=1e-6)
    far = normal(1, "embedding.weight", 10**12, 10**12 + 3)
    assert np.allclose(far, [0.8104267, -0.8507363, -0.7608342], atol=1e-6)


def test_far_elements_are_made_alone() -> None:
    far = 10**14
    assert np.array_equal(normal(0, "a", far, far + 100)[50:], normal(0, "a", far + 50, far + 100))


def test_values_by_kind() -> None:
    reader = InitialWeights(replace(MODEL, norm=Norm.layer, attention_bias=True), seed=0)
    assert reader.optimizer_step == 0
    assert torch.equal(reader.read("master", "layers.0.mlp_norm.weight", 3, 7), torch.ones(4))
    assert torch.equal(reader.read("master", "layers.0.mlp_norm.bias", 3, 7), torch.zeros(4))
    assert torch.equal(reader.read("master", "layers.0.attention.out.bias", 0, 5), torch.zeros(5))
    assert torch.equal(reader.read("exp_avg", "embedding.weight", 0, 5), torch.zeros(5))
    embedding = reader.read("master", "embedding.weight", 0, 131 * 64)
    assert (embedding.dtype, embedding.shape) == (torch.float32, (131 * 64,))
    assert abs(embedding.std().item() / MODEL.initializer_std - 1) < 0.05
    out = reader.read("master", "layers.2.attention.out.weight", 0, 64 * 64)
    assert abs(out.std().item() / (MODEL.initializer_std / 6**0.5) - 1) < 0.05
