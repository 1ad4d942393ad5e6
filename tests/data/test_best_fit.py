from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatrain.batch import IGNORE
from megatrain.config import ObjectiveConfig
from megatrain.data import best_fit as best_fit_module
from megatrain.data.best_fit import open_best_fit
from megatrain.data.format import ShardSet
from megatrain.data.loader import to_sequences
from megatrain.data.samples import SampleOrder, open_sources, read_samples
from megatrain.data.sequences import read_members
from megatrain.data_config import DataConfig, Packing, SourceConfig
from megatrain.errors import GaveUp, InputError
from megatrain.objectives import build
from tests.data.sets import EOS, row, write_set

LENGTH = 6
FOUR_UNITS = [[[5, 11, 3] * 90, [20, 1, 1]], [[2, 40], [1, 7, 7]]]
"""The first member has 256 samples and more: shards of two units and of one."""


def config(folder: Path, **values: object) -> DataConfig:
    return DataConfig(
        sources={"web": SourceConfig(path=str(folder), max_epochs=1.0)},
        packing=Packing.best_fit,
        **values,  # type: ignore[arg-type]
    )


def pieces_of(shards: ShardSet, length: int = LENGTH) -> list[list[tuple[int, int]]]:
    """The pieces of every sample of a set."""
    index = open_best_fit(shards, read_members(shards), length)
    pieces = index.locate(np.arange(index.samples))
    samples: list[list[tuple[int, int]]] = [[] for _ in range(index.samples)]
    for sample, start, stop in zip(*(a.tolist() for a in (pieces.sample, pieces.start, pieces.stop)), strict=True):
        samples[sample].append((start, stop))
    return samples


def index_file(folder: Path) -> Path:
    (path,) = folder.glob("**/best_fit-*.index")
    return path


@pytest.mark.parametrize("length", [1, 6, 50])
def test_an_epoch_predicts_every_token_but_the_first_of_a_document_once(tmp_path: Path, length: int) -> None:
    shards = write_set(tmp_path, FOUR_UNITS)
    sources = open_sources(config(tmp_path), length)
    order = SampleOrder(sources, seed=1)
    batch = build(ObjectiveConfig(), document_mask=True)(to_sequences(order.read(np.arange(order.total_samples or 0))))
    ids, document = row(shards)
    targets = batch.targets.flatten()
    expected = ids[document != np.arange(len(ids))]
    assert Counter(targets[targets != IGNORE].tolist()) == Counter(expected.tolist())
    # Ids count on, so where a target is looked at from its own document the id before it is the input.
    inner = (targets != IGNORE) & (targets != EOS)
    assert torch.equal(batch.input_ids.flatten()[inner] + 1, targets[inner])


def test_pieces_are_documents_to_themselves(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[3, 9, 2, 2]]])
    ids, _ = row(shards)
    sources = open_sources(config(tmp_path), LENGTH)
    raw = read_samples(sources, np.zeros(2, np.int32), np.array([0, 1]))
    # The document of 9 is cut into 7 and 3, the last id of the one being the first of the other.
    assert raw.ids[0].tolist() == ids[3:10].tolist()
    assert raw.ids[1].tolist() == [*ids[0:3], *ids[9:12], 0]
    assert raw.length.tolist() == [7, 6]
    assert raw.document.tolist() == [[0] * 7, [0, 0, 0, 3, 3, 3, 6]]


def test_samples_stay_within_their_pack_unit(tmp_path: Path) -> None:
    shards = write_set(tmp_path, FOUR_UNITS)
    units = [0, 90 * 19, 90 * 19 + 22, 90 * 19 + 22 + 42 + 15]
    for sample in pieces_of(shards):
        assert len({int(np.searchsorted(units, start, side="right")) for start, _ in sample}) == 1
        assert {np.searchsorted(units, stop) for _, stop in sample} == {
            np.searchsorted(units, start, side="right") for start, _ in sample
        }


def test_samples_found_one_by_one_and_together_are_the_same(tmp_path: Path) -> None:
    shards = write_set(tmp_path, FOUR_UNITS)
    index = open_best_fit(shards, read_members(shards), LENGTH)
    order = np.random.default_rng(0).permutation(index.samples)
    together = index.locate(order)
    for place, number in enumerate(order.tolist()):
        alone = index.locate(np.array([number]))
        assert alone.start.tolist() == together.start[together.sample == place].tolist()
        assert alone.stop.tolist() == together.stop[together.sample == place].tolist()
    assert index.locate(order[:0]).start.tolist() == []


def test_the_padding_share_is_that_of_the_samples(tmp_path: Path) -> None:
    samples = pieces_of(write_set(tmp_path, FOUR_UNITS))
    (source,) = open_sources(config(tmp_path), LENGTH)
    targets = sum(sum(stop - start for start, stop in sample) - 1 for sample in samples)
    assert source.index.padding_share == pytest.approx(1 - targets / (LENGTH * len(samples)), abs=1e-12)


def test_the_index_is_the_same_by_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_set(tmp_path, FOUR_UNITS)
    pieces_of(shards)
    alone = index_file(tmp_path)
    one = alone.read_bytes()
    alone.unlink()
    monkeypatch.setattr(best_fit_module, "DOCUMENTS_A_WORKER", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    pieces_of(shards)
    assert index_file(tmp_path).read_bytes() == one


def test_the_index_of_other_data_is_another(tmp_path: Path) -> None:
    first, second = write_set(tmp_path / "a", [[[5, 6]]]), write_set(tmp_path / "b", [[[6, 5]]])
    kept = str(tmp_path)
    for shards in (first, second):
        open_best_fit(shards, read_members(shards), LENGTH, kept)
    assert len(list(tmp_path.glob("best_fit-6-*.index"))) == 2
    assert not list(tmp_path.glob("*/**/*.index"))


def test_an_altered_index_is_made_anew_or_named(tmp_path: Path) -> None:
    shards = write_set(tmp_path, FOUR_UNITS)
    samples = pieces_of(shards)
    path = index_file(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-40] + b"x" + whole[-39:]):
        path.write_bytes(damaged)
        assert pieces_of(shards) == samples
        assert path.read_bytes() == whole
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])  # in the block of the first unit
    index = open_best_fit(shards, read_members(shards), LENGTH)
    assert len(index.locate(np.array([index.samples - 1])).start) > 0
    for _ in range(2):
        with pytest.raises(GaveUp, match="train: its best_fit-6 index was altered"):
            index.locate(np.array([0]))


def test_a_folder_that_cant_be_written_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, FOUR_UNITS)
    with pytest.raises(InputError, match=r"data\.index_path=/proc: best_fit-6-.* can't be written there"):
        open_sources(config(tmp_path, index_path="/proc"), LENGTH)


def test_lengths_that_arent_those_of_the_index_are_named(tmp_path: Path) -> None:
    shards = write_set(tmp_path, FOUR_UNITS)
    data = bytearray(shards.path(1).read_bytes())
    data[shards.members(1)[1].lengths_offset] ^= 1
    shards.path(1).write_bytes(data)
    with pytest.raises(GaveUp, match=r"shard-000001\.tar: the documents' lengths at byte \d+ aren't those"):
        pieces_of(shards)


def test_documents_without_targets_are_no_samples(tmp_path: Path) -> None:
    write_set(tmp_path, [[[1, 1, 1, 1]]])
    with pytest.raises(InputError, match="holds no sample: it has 4 tokens"):
        open_sources(config(tmp_path), LENGTH)
