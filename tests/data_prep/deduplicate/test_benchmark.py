"""benchmarks/deduplicate.py at a tiny size."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasketch")
pytest.importorskip("datatrove")

from benchmarks import deduplicate


def test_all_contenders_are_measured(tmp_path: Path) -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices(["some", "words", "a@b.org", "8.8.8.8", "漢字"], k=300)) for _ in range(60)]
    for number in range(2):
        pq.write_table(pa.table({"text": texts[number::2]}), tmp_path / f"{number}.parquet")
    result = deduplicate.measure(argparse.Namespace(input=str(tmp_path), megabytes=1, rounds=1))
    assert {row["contender"]: row["ratio"] for row in result.rows if row["ratio"] == 1} == {
        "MinHash, datatrove": 1,
        "e-mail and IP, datatrove": 1,
    }
    assert len(result.rows) == 8
    (bar,) = result.bars
    assert (bar.target, bar.holds) == (8.0, bar.value >= 8)
