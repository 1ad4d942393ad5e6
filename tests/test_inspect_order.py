"""`megatrain inspect sample=` and `order=`: the text and the documents of samples, of a set and of a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatrain.checkpoint.manager import CheckpointManager
from megatrain.command_config import InspectConfig
from megatrain.compose import plain
from megatrain.data.documents import extracts
from megatrain.data.format import TOKENIZER, TRAIN
from megatrain.data.samples import SampleOrder, open_sources
from megatrain.data.state import State, start_state, then
from megatrain.data_config import DataConfig, SourceConfig
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.pipeline import run as prepare
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from megatrain.errors import GaveUp, InputError
from megatrain.inspect import run
from tests.checkpoint.layouts import even_layout, random_whole, trainer_state
from tests.tokenizer import load, make_tokenizer

LENGTH = 16
SHAPES: dict[str, tuple[int, ...]] = {"embedding": (50, 20)}
TEXTS = [
    f"the {number} words of the text that document {number} is: " + "and the ends " * number for number in range(9)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of nine documents, in members of a few."""
    folder, text = tmp_path / "set", tmp_path / "text.jsonl"
    rows = [
        {"text": each, "id": f"doc-{number}", "url": f"https://example.org/{number}"}
        for number, each in enumerate(TEXTS)
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = TokenizerConfig(path=str(make_tokenizer(tmp_path / TOKENIZER)))
    config = PrepConfig(input=str(text), output=str(folder), tokenizer=tokenizer, held_out_share=0.0, workers=1)
    assert prepare(replace(config, member_bytes=200, shard_bytes=4000)) == 0
    return folder


def test_extracts_are_the_documents_of_the_ids(folder: Path) -> None:
    """Put together, the ids of all extracts of all samples are those of the samples, and of the documents."""
    (source,) = open_sources(DataConfig(path=str(folder)), LENGTH)
    tokenizer = load(folder / TOKENIZER)
    order = SampleOrder([source], seed=0)
    raw = order.read(np.arange(source.index.samples))
    _, samples = order.locate(np.arange(source.index.samples))
    assert len(source.manifest.shards) > 1
    for row, sample in enumerate(samples.tolist()):
        place = 0
        for found in extracts(source, sample):
            number = int((found.id or "").removeprefix("doc-"))
            assert found.url == f"https://example.org/{number}"
            ids = [*tokenizer.encode(TEXTS[number]).ids, 0]
            assert found.tokens == len(ids)
            assert (found.start, found.stop > found.start) == (place, True)
            expected = ids[found.first : found.first + found.stop - found.start]
            assert raw.ids[row, found.start : found.stop].tolist() == expected
            assert source.manifest.shards[int(found.shard[6:12])].members > found.member
            place = found.stop
        assert place == raw.length[row]


def test_the_text_of_a_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = InspectConfig(path=str(folder), sample=4, sequence_length=LENGTH, seed=3)
    assert run(config) == 0
    out = capsys.readouterr().out
    order = SampleOrder(open_sources(DataConfig(path=str(folder)), LENGTH), seed=3)
    raw = order.read(np.array([4]))
    text = load(folder / TOKENIZER).decode(raw.ids[0, : raw.length[0]].tolist(), skip_special_tokens=False)
    printed = "".join(line for line in out.splitlines() if not re.search("[─│━┏┃]", line))
    assert printed.replace(" ", "") == text.replace(" ", "")
    assert "https://example.org/" in out


def test_the_documents_of_a_stretch_of_a_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(InspectConfig(path=str(folder), order="7:10", sequence_length=LENGTH)) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows if row[1].strip()] == sorted(
        row[1].strip() for row in rows if row[1].strip()
    )
    assert {row[1].strip() for row in rows} - {""} == {"7", "8", "9"}
    assert any(row[5].strip().startswith("doc-") for row in rows)


def save(run_dir: Path, folder: Path, state: State) -> None:
    data = DataConfig(sources={"web": SourceConfig(path=str(folder))})
    trainer = trainer_state(10)
    trainer["data"] = dict(state)
    trainer["config"] = {**trainer["config"], "data": plain(data), "seed": 5, "sequence_length": LENGTH}
    CheckpointManager(run_dir).save(10, even_layout(SHAPES, 1).shards(0, random_whole(SHAPES)), trainer)


def test_a_run_has_its_own_order(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataConfig(sources={"web": SourceConfig(path=str(folder))})
    sources = open_sources(data, LENGTH)
    state = start_state(sources, 5, 4)
    longer = start_state(open_sources(data, 2 * LENGTH), 5, 4)
    state = then({**state, "n": 8}, longer, passed_over_until=11)
    save(tmp_path / "run", folder, {**state, "n": 20})
    for n, order in ((3, SampleOrder(sources, 5)), (13, SampleOrder(open_sources(data, 32), 5, state["segments"][1]))):
        assert run(InspectConfig(path=str(tmp_path / "run"), sample=n)) == 0
        first = capsys.readouterr().out.splitlines()[3].split("│")
        assert first[1].strip() == str(n)
        assert first[2].strip() == "web"
        assert first[3].strip() == str(order.locate(np.array([n]))[1][0])
    with pytest.raises(InputError, match=r"^sample=9: samples 8 to 11 were passed over$"):
        run(InspectConfig(path=str(tmp_path / "run"), sample=9))
    with pytest.raises(InputError, match=r"^seed=1: is for a shard set; a run has its own$"):
        run(InspectConfig(path=str(tmp_path / "run"), sample=9, seed=1))


@pytest.mark.parametrize("order", ["3", "3:3", "a:b", "-1:2", "5:1"])
def test_what_is_no_stretch_is_named(folder: Path, order: str) -> None:
    with pytest.raises(InputError, match=rf"^order={order}: legal: FIRST:LAST"):
        run(InspectConfig(path=str(folder), order=order))


def test_other_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^sample=-1: legal: 0 or more$"):
        run(InspectConfig(path=str(folder), sample=-1))
    with pytest.raises(InputError, match=r"^sequence_length=0: legal: 1 or more$"):
        run(InspectConfig(path=str(folder), sample=1, sequence_length=0))
    with pytest.raises(InputError, match=r"^order=1:2: and sample= are two questions"):
        run(InspectConfig(path=str(folder), sample=1, order="1:2"))
    with pytest.raises(InputError, match=r"no train/manifest\.json in it"):
        run(InspectConfig(path=str(tmp_path), sample=1))


def test_a_set_without_metadata_and_one_with_other_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = InspectConfig(path=str(folder), order="0:40", sequence_length=LENGTH)
    for path in (folder / TRAIN).glob("*.parquet"):
        path.write_bytes(b"PAR1 and no more")
    with pytest.raises(GaveUp, match=r"shard-00000\d\.parquet: "):
        run(config)
    for path in (folder / TRAIN).glob("*.parquet"):
        path.unlink()
    assert run(config) == 0
    assert "doc-" not in capsys.readouterr().out
