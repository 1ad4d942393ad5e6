from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megatrain.data.format import HELD_OUT
from megatrain.data.samples import EMPTY, LOCATED_AT_ONCE, SampleOrder, held_out_order, open_sources, read_samples
from megatrain.data_config import DataConfig, SourceConfig
from megatrain.errors import InputError
from tests.data.sets import row, write_set

LENGTH = 6


@pytest.fixture
def two(tmp_path: Path) -> DataConfig:
    """A large and a small source; the order in the configuration isn't that of the names."""
    write_set(tmp_path / "large", [[[5, 11, 3], [20]], [[2, 40]]])
    write_set(tmp_path / "small", [[[4, 4, 4]]])
    return DataConfig(
        sources={
            "web": SourceConfig(path=str(tmp_path / "large"), weight=3.0),
            "code": SourceConfig(path=str(tmp_path / "small"), weight=1.0),
        }
    )


def test_samples_are_windows_with_padding_of_their_own(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[5, 11, 3]]])
    ids, document = row(shards)
    raw = read_samples(
        open_sources(DataConfig(path=str(tmp_path)), LENGTH), np.zeros(4, np.int32), np.array([0, 1, 2, EMPTY])
    )
    assert raw.ids.tolist() == [ids[0:7].tolist(), ids[6:13].tolist(), ids[12:19].tolist(), [0] * 7]
    assert raw.length.tolist() == [7, 7, 7, 0]
    assert raw.document[0].tolist() == [0, 0, 0, 0, 0, 5, 5]
    assert raw.document[1].tolist() == [0] * 7
    assert raw.document[2].tolist() == [0, 0, 0, 0, 4, 4, 4]
    short = read_samples(open_sources(DataConfig(path=str(tmp_path)), 17), np.zeros(1, np.int32), np.array([1]))
    assert short.ids[0].tolist() == [*ids[17:].tolist(), *[0] * 16]
    assert short.length.tolist() == [2]
    assert short.document[0].tolist() == [0, 0, *[2] * 16]
    assert document.max() == 16


def test_sources_are_numbered_by_name(two: DataConfig) -> None:
    forwards = SampleOrder(open_sources(two, LENGTH), seed=0)
    backwards = SampleOrder(open_sources(DataConfig(sources=dict(reversed(two.sources.items()))), LENGTH), seed=0)
    assert [source.name for source in forwards.sources] == ["code", "web"]
    n = np.arange(100)
    assert np.array_equal(np.stack(forwards.locate(n)), np.stack(backwards.locate(n)))
    assert np.bincount(forwards.locate(n)[0]).tolist() == [25, 75]


def test_each_source_goes_through_its_samples_once_an_epoch(two: DataConfig) -> None:
    order = SampleOrder(open_sources(two, LENGTH), seed=3)
    source, sample = order.locate(np.arange(400))
    for number, each in enumerate(order.sources):
        stream = sample[source == number]
        size = each.index.samples
        epochs = stream[: len(stream) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(epochs) > 3
        assert len(np.unique(epochs, axis=0)) > 1


def test_samples_read_by_n_are_those_that_the_order_names(two: DataConfig) -> None:
    order = SampleOrder(open_sources(two, LENGTH), seed=3)
    n = np.array([5, EMPTY, 0, 123_456_789_012])
    raw = order.read(n)
    assert raw.length[1] == 0
    source, sample = order.locate(n[[0, 2, 3]])
    again = read_samples(order.sources, source, sample)
    assert np.array_equal(raw.ids[[0, 2, 3]], again.ids)
    assert np.array_equal(raw.source[[0, 2, 3]], source)


@pytest.mark.parametrize("max_epochs", [None, 40.0])
def test_samples_of_steps_are_those_of_their_numbers(two: DataConfig, max_epochs: float | None) -> None:
    for config in two.sources.values():
        config.max_epochs = max_epochs
    order = SampleOrder(open_sources(two, LENGTH), seed=3)
    places = np.array([2, 3, 6, 7])  # of a rank whose last lot is not all in the step of seven samples
    steps = list(islice(order.steps(5, 7, places), LOCATED_AT_ONCE // 4 + 5))  # some of them of a second call
    assert order.total_samples == (None if max_epochs is None else 640)
    for step, (n, source, sample) in enumerate(steps):
        wanted = 5 + 7 * step + places[:3]
        there = wanted < (order.total_samples or np.inf)
        assert n.tolist() == [*np.where(there, wanted, EMPTY), EMPTY]
        assert np.array_equal(np.stack(order.locate(n)), np.stack((source, sample)))
        assert (sample == EMPTY).tolist() == (n == EMPTY).tolist()


def test_path_is_short_for_a_source(tmp_path: Path) -> None:
    write_set(tmp_path, [[[50]]])
    short = open_sources(DataConfig(path=str(tmp_path)), LENGTH)
    long = open_sources(DataConfig(sources={"data": SourceConfig(path=str(tmp_path))}), LENGTH)
    n = np.arange(40)
    assert np.array_equal(SampleOrder(short, 0).locate(n)[1], SampleOrder(long, 0).locate(n)[1])


def test_bad_sources_are_named(tmp_path: Path, two: DataConfig) -> None:
    with pytest.raises(InputError, match=r"data\.path or data\.sources\.NAME\.path: give one"):
        open_sources(DataConfig(), LENGTH)
    with pytest.raises(InputError, match=r"data\.path or data\.sources\.NAME\.path: give one"):
        open_sources(DataConfig(path="x", sources=two.sources), LENGTH)
    with pytest.raises(InputError, match="missing"):
        open_sources(DataConfig(path=str(tmp_path / "missing")), LENGTH)
    write_set(tmp_path / "empty", [[[1]]])
    with pytest.raises(InputError, match="empty/train: holds no sample: it has 1 tokens"):
        open_sources(DataConfig(path=str(tmp_path / "empty")), LENGTH)
    write_set(tmp_path / "other", [[[9]]], tokenizer=b'{"other": 1}')
    two.sources["odd"] = SourceConfig(path=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"data\.sources\.odd\.path=.*tokenizer is not that of code"):
        open_sources(two, LENGTH)
    del two.sources["odd"]
    two.sources["web"].weight = -1.0
    with pytest.raises(InputError, match=r"data\.sources\.web\.weight=-1\.0"):
        SampleOrder(open_sources(two, LENGTH), seed=0)


def test_the_held_out_order_takes_the_first_of_each_source(tmp_path: Path) -> None:
    write_set(tmp_path / "held" / "a", [[[100]]], split=HELD_OUT)
    write_set(tmp_path / "held" / "b", [[[8]]], split=HELD_OUT)
    config = DataConfig(sources={n: SourceConfig(path=str(tmp_path / "held" / n)) for n in ("a", "b")})
    sources = open_sources(config, LENGTH, HELD_OUT)
    assert [source.index.samples for source in sources] == [17, 2]
    for samples, expected in ((5, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]), (1, [(0, 0)])):
        source, sample = held_out_order(sources, samples)
        assert list(zip(source.tolist(), sample.tolist(), strict=True)) == expected
    assert len(held_out_order(sources, None)[0]) == 19
    assert len(held_out_order(sources, 12)[0]) == 8
