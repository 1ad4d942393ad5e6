"""The batch: masks and their column forms, sums and their quotient."""

from __future__ import annotations

import torch

from megatrain.batch import Batch, Stats, mask_end


def test_without_an_end_the_mask_is_causal() -> None:
    start = torch.zeros(2, 3, dtype=torch.int32)
    assert mask_end(start, None).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert mask_end(start, start + 3) is not start
    assert mask_end(start, start + 3).tolist() == [[3, 3, 3], [3, 3, 3]]


def test_map_leaves_none() -> None:
    ids = torch.ones(2, 3, dtype=torch.int32)
    batch = Batch(ids, ids, ids, ids, None, ids[:, 0])
    half = batch.map(lambda tensor: tensor[:1])
    assert (half.end, half.documents) == (None, None)
    assert half.input_ids.shape == (1, 3)
    assert half.source.shape == (1,)


def test_the_loss_is_one_mean_over_all_targets() -> None:
    stats = Stats(torch.tensor([6.0, 2.0]), torch.tensor([3, 1]), None)
    assert stats.loss().item() == 2.0
    assert Stats(torch.zeros(2), torch.zeros(2, dtype=torch.int64), None).loss().item() == 0.0
