"""Stages and parts: together they are the whole model, each element where it should be, the work evenly divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config import ModelConfig
from megatrain.model import partition, spec
from megatrain.model.partition import Piece
from megatrain.model.transformer import Transformer
from megatrain.parallel.tensor import TensorParallel
from tests import samples

BIG = ModelConfig(
    vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, intermediate_size=11008
)


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    vocab_size=st.integers(1, 40),
    tied=st.booleans(),
    count=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_element_is_held_once_by_first_copies(
    tensor: int, kv_heads: int, vocab_size: int, tied: bool, count: int
) -> None:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=3,
        num_heads=8,
        num_kv_heads=kv_heads,
        intermediate_size=24,
        attention_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tie_embeddings=tied,
    )
    copies: dict[str, list[Piece]] = {}
    for stage in partition.stages(config, count, sequence_length=32):
        shapes = {p.name: partition.local_shape(config, p, tensor) for p in spec.parameters(config)}
        for rank in range(tensor):
            for name, part in partition.parts(config, stage, rank, tensor).items():
                held = sum(piece.stop - piece.start for piece in part.pieces)
                assert held <= torch.Size(shapes[name]).numel()
                copies.setdefault(name, []).extend(part.pieces)
    for parameter in spec.parameters(config):
        pieces = copies.pop(parameter.name)
        for first in [piece for piece in pieces if piece.replica == 0]:
            same = [piece for piece in pieces if (piece.start, piece.stop) == (first.start, first.stop)]
            assert sorted(piece.replica for piece in same) == list(range(first.replicas))
        ends = sorted((piece.start, piece.stop) for piece in pieces if piece.replica == 0)
        assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
        assert ends[-1][1] == parameter.size
    assert not copies


@pytest.mark.parametrize("out_bias", [None, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stage_is_built_of_its_parts(count: int, tied: bool, out_bias: bool | None) -> None:
    config = replace(
        samples.MODEL, tie_embeddings=tied, attention_bias=True, attention_out_bias=out_bias, mlp_bias=True
    )
    of_spec = {parameter.name: parameter for parameter in spec.parameters(config)}
    # Four ranks, two to a key-value head; the group only has to be there.
    tensor = TensorParallel(rank=1, size=4, kv_group=object())  # type: ignore[arg-type]
    for stage in partition.stages(config, count, sequence_length=32):
        with torch.device("meta"):
            whole, part = Transformer(config, stage), Transformer(config, stage, tensor)
        names = [parameter.name for parameter in partition.stage_parameters(config, stage)]
        assert list(whole.parts) == names
        assert {name: tuple(p.shape) for name, p in whole.named_parameters()} == {n: of_spec[n].shape for n in names}
        assert {name: tuple(p.shape) for name, p in part.named_parameters()} == {
            n: partition.local_shape(config, of_spec[n], 4) for n in names
        }


def test_a_shared_head() -> None:
    """Eight query heads of two elements, two key-value heads, four ranks: groups of 4 + 2 heads, two ranks a group."""
    config = ModelConfig(hidden_size=1, num_heads=8, num_kv_heads=2, head_dim=2, num_layers=1)
    (qkv,) = (parameter for parameter in spec.parameters(config) if parameter.name.endswith("qkv.weight"))
    assert partition.pieces(config, qkv, rank=3, size=4) == (Piece(16, 20), Piece(20, 24, 1, 2))
    assert partition.pieces(config, qkv, rank=0, size=4) == (Piece(0, 4), Piece(8, 12, 0, 2))


def test_cutting_a_part_leaves_padding_out() -> None:
    held = (Piece(10, 14), Piece(20, 23, 1, 2))
    assert list(partition.cut(held, 2, 9)) == [(Piece(12, 14), 2), (Piece(20, 23, 1, 2), 4)]
    assert list(partition.cut(held, 7, 9)) == []


def test_stages_of_a_big_model() -> None:
    """The head has the FLOPs of 0.6 layers (of 4.8, where the vocabulary is huge), the embedding as many weights."""
    layers = [stage.stop - stage.start for stage in partition.stages(BIG, 4, sequence_length=4096)]
    assert layers == [8, 8, 8, 8]
    layers = [stage.stop - stage.start for stage in partition.stages(replace(BIG, num_layers=31), 4, 4096)]
    assert layers == [8, 8, 8, 7]
    huge_vocabulary = replace(BIG, vocab_size=256000)
    assert [stage.stop - stage.start for stage in partition.stages(huge_vocabulary, 4, 4096)] == [9, 9, 9, 5]
    # Of three divisions with nine layers at most, the one that spares the stage with the embedding.
    layers = [s.stop - s.start for s in partition.stages(replace(huge_vocabulary, num_layers=30), 4, 4096)]
    assert layers == [8, 9, 9, 4]


@given(layers=st.integers(1, 12), count=st.integers(1, 6), vocab_size=st.integers(1, 4000))
@settings(max_examples=40, deadline=None)
def test_no_division_is_faster(layers: int, count: int, vocab_size: int) -> None:
    config = replace(samples.MODEL, num_layers=layers, vocab_size=vocab_size)
    count = min(count, layers)
    head = 2 * vocab_size * config.hidden_size
    layer = (spec.flops_per_token(config, 64) - head) / layers
    stages = partition.stages(config, count, sequence_length=64)
    slowest = max((s.stop - s.start) * layer + head * s.last for s in stages)
    # The last stage has between 1 and layers - count + 1 layers, the others share what is left.
    best = min(
        max(last * layer + head, (-(-(layers - last) // (count - 1)) if count > 1 else 0) * layer)
        for last in ([layers] if count == 1 else range(1, layers - count + 2))
    )
    assert slowest == pytest.approx(best)
