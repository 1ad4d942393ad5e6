from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.observe.records import LineFile, Value, decode, encode, read, without_secrets
from tests.conftest import fill

VALUES: st.SearchStrategy[Value] = st.none() | st.integers() | st.floats() | st.text()


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "non_finite"), VALUES))
def test_a_line_is_valid_json_and_gives_the_record_back(record: dict[str, Value]) -> None:
    line = encode(record)
    assert "\n" not in line
    json.loads(line, parse_constant=pytest.fail)  # called for NaN and Infinity, which are no JSON
    back = decode(line.encode(errors="surrogatepass"))
    assert back is not None
    assert list(back) == list(record)
    # repr tells -0.0 from 0.0, 1 from 1.0, and calls every NaN the same.
    assert [repr(value) for value in back.values()] == [repr(value) for value in record.values()]


def test_a_number_that_is_not_finite_is_null_and_named() -> None:
    line = encode({"step": 3, "loss": math.nan, "grad_norm": math.inf, "z": -math.inf})
    assert json.loads(line) == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "z": None,
        "non_finite": {"loss": "nan", "grad_norm": "inf", "z": "-inf"},
    }


def test_lines_that_are_not_whole_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[2]\n{"step": \xff}\n\0\0\0\n{"step": 4}\n{"step": 5, "lo')
    assert list(read(path)) == [{"step": 1}, {"step": 4}]
    assert list(read(tmp_path / "missing.jsonl")) == []


def test_keys_that_name_a_secret_are_left_out() -> None:
    tree = {
        "tokenizer": "t.json",
        "tokens": 5,
        "max_tokens": 7,
        "logger": {"api_key": "S", "API-KEY": "S", "hub_token": "S", "project": "p"},
        "remotes": [{"password": "S", "host": "h"}],
    }
    assert without_secrets(tree) == {
        "tokenizer": "t.json",
        "tokens": 5,
        "max_tokens": 7,
        "logger": {"project": "p"},
        "remotes": [{"host": "h"}],
    }


def test_lines_that_a_full_disk_does_not_take_come_when_it_does(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1 << 16)
    path = disk / "metrics.jsonl"
    lines = LineFile(path)
    lines.write({"step": 0})
    ballast = fill(disk)
    for step in range(1, 1000):
        lines.write({"step": step})
    lines.sync()
    assert len(list(read(path))) < 500
    with pytest.raises(OSError, match="No space left on device"):
        lines.close()
    ballast.unlink()
    lines.write({"step": 1000})
    lines.close()
    assert list(read(path)) == [{"step": step} for step in range(1001)]
