from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatrain.data.samples import open_sources
from megatrain.data.segments import next_segment
from megatrain.data.state import State, check_state, resume_state, start_state
from megatrain.data_config import DataConfig, SourceConfig
from megatrain.errors import InputError
from tests.data.sets import write_set


def state_of(
    folder: Path, seed: int = 0, length: int = 6, size: int = 4, weight: float = 1.0, **data: int | None
) -> State:
    config = DataConfig(sources={"web": SourceConfig(path=str(folder), weight=weight)}, **data)  # type: ignore[arg-type]
    return start_state(open_sources(config, length), seed, size)


def test_the_state_is_json(tmp_path: Path) -> None:
    shards = write_set(tmp_path, [[[50]]])
    state = state_of(tmp_path)
    assert json.loads(json.dumps(state)) == state
    assert state["n"] == 0
    assert state["segments"] == [
        {
            "from_sample": 0,
            "mixture_from": 0,
            "tokens": 0,
            "sequence_length": 6,
            "packing": "concat",
            "global_batch_size": 4,
            "mixture": {
                "web": {
                    "weight": 1.0,
                    "max_epochs": None,
                    "manifest_sha256": shards.manifest.sha256,
                    "samples": 9,
                    "shuffle_block": None,
                    "shuffle_blocks": 1,
                    "permutation": 0,
                    "first": 0,
                    "epochs": 0.0,
                }
            },
            "passed_over": None,
            "repeat_share": 0.0,
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
    assert line.endswith("legal: as it was, or data.allow_change=true, which goes on with what is asked for now")


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
    begun = resumed["segments"][1]
    assert (begun["from_sample"], begun["global_batch_size"], begun["tokens"]) == (12, 5, 72)
    assert begun["reason"] == "global_batch_size changed"
    assert (begun["mixture_from"], begun["mixture"]) == (0, saved["segments"][0]["mixture"])
    assert begun["repeat_share"] == 0


def test_a_change_that_is_allowed_is_a_segment_that_says_what_changed(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [[[50]]])
    write_set(tmp_path / "b", [[[51]]])
    saved: State = {**state_of(tmp_path / "a"), "n": 12}
    current = state_of(tmp_path / "b", weight=2.0)
    resumed = resume_state(saved, current, allow_change=True)
    assert resumed["fingerprint"] == current["fingerprint"]
    begun = resumed["segments"][1]
    assert "data.sources.web.weight=2.0 (saved: 1.0)" in begun["reason"]
    part = begun["mixture"]["web"]
    assert (part["permutation"], part["first"], part["weight"]) == (1, 0, 2.0)
    assert part["epochs"] == pytest.approx(12 / 9)
    assert begun["repeat_share"] == pytest.approx(3 / 9)
    assert resume_state(resumed, current) == resumed


def test_another_length_begins_another_permutation(tmp_path: Path) -> None:
    write_set(tmp_path, [[[50]]])
    (first,), (longer,) = (state_of(tmp_path, length=length)["segments"] for length in (6, 12))
    begun = next_segment(first, 3, longer)
    assert (begun["sequence_length"], begun["tokens"]) == (12, 18)
    assert begun["mixture"]["web"]["samples"] == 5
    back = next_segment(begun, 5, first)
    assert back["tokens"] == 18 + 2 * 12
    assert (back["mixture"]["web"]["permutation"], back["mixture"]["web"]["first"]) == (2, 0)
    assert back["mixture"]["web"]["epochs"] == pytest.approx(3 / 9 + 2 / 5)


def test_other_blocks_begin_another_permutation(tmp_path: Path) -> None:
    write_set(tmp_path, [[[50]]])
    saved: State = {**state_of(tmp_path), "n": 3}
    assert resume_state(saved, state_of(tmp_path, shuffle_blocks=7)) == saved  # of no effect without shuffle_block
    with pytest.raises(InputError, match=r"data\.shuffle_block=4 \(saved: None\), data\.shuffle_blocks=7"):
        resume_state(saved, state_of(tmp_path, shuffle_block=4, shuffle_blocks=7))
    resumed = resume_state(saved, state_of(tmp_path, shuffle_block=4, shuffle_blocks=7), allow_change=True)
    part = resumed["segments"][1]["mixture"]["web"]
    assert (part["shuffle_block"], part["permutation"], part["first"]) == (4, 1, 0)
