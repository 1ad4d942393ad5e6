from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatrain.config import DataConfig, SourceConfig
from megatrain.data.samples import open_sources
from megatrain.data.state import State, check_state, resume_state, start_state
from megatrain.errors import InputError
from tests.data.sets import write_set


def state_of(folder: Path, seed: int = 0, length: int = 6, size: int = 4, weight: float = 1.0) -> State:
    config = DataConfig(sources={"web": SourceConfig(path=str(folder), weight=weight)})
    return start_state(open_sources(config, length), seed, size)


def test_the_state_is_json(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[50]]])
    state = state_of(tmp_path)
    assert json.loads(json.dumps(state)) == state
    assert state["n"] == 0
    assert state["segments"] == [
        {
            "from_sample": 0,
            "sequence_length": 6,
            "global_batch_size": 4,
            "mixture": {"web": 1.0},
            "passed_over": None,
            "reason": "start",
        }
    ]
    assert state["fingerprint"]["data.sources.web.manifest_sha256"] == shards.manifest.sha256


def test_the_same_data_elsewhere_continue(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [[[50]]])
    write_set(tmp_path / "b", [[[50]]])
    saved: State = {**state_of(tmp_path / "a"), "n": 12}
    assert resume_state(saved, state_of(tmp_path / "b")) == saved


def test_all_that_differs_is_named_in_one_line(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [[[50]]])
    shards = write_set(tmp_path / "b", [[[51]]])
    with pytest.raises(InputError) as refused:
        check_state(state_of(tmp_path / "a"), state_of(tmp_path / "b", seed=1, length=8, weight=2.0))
    line = str(refused.value)
    assert "\n" not in line
    assert "seed=1 (saved: 0)" in line
    assert "sequence_length=8 (saved: 6)" in line
    assert "data.sources.web.weight=2.0 (saved: 1.0)" in line
    assert f"data.sources.web.manifest_sha256={shards.manifest.sha256} (saved: " in line
    assert "packing" not in line


def test_another_source_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, [[[50]]])
    one = start_state(open_sources(DataConfig(path=str(tmp_path)), 6), 0, 4)
    with pytest.raises(InputError) as refused:
        check_state(one, state_of(tmp_path))
    assert "data.sources.web.weight=1.0 (saved: absent)" in str(refused.value)
    assert "data.sources.data.weight=absent (saved: 1.0)" in str(refused.value)


def test_another_batch_size_begins_a_segment(tmp_path: Path) -> None:
    write_set(tmp_path, [[[50]]])
    saved: State = {**state_of(tmp_path), "n": 12}
    resumed = resume_state(saved, state_of(tmp_path, size=5))
    assert resumed["n"] == 12
    assert len(saved["segments"]) == 1
    assert resumed["segments"][0] == saved["segments"][0]
    assert resumed["segments"][1]["from_sample"] == 12
    assert resumed["segments"][1]["global_batch_size"] == 5
    assert resumed["segments"][1]["reason"] == "global_batch_size changed"
