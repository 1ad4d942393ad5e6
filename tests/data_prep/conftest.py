"""What tests of whole runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.data_prep import pipeline
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.tokenizer import train
from megatrain.data_prep.tokenizer.config import TokenizerConfig
from tests.data_prep.running import in_this_process, text


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train([text(number) for number in range(300)], 400).data)
    return path


@pytest.fixture
def processes() -> None:
    """For tests of what real workers do; the others spare themselves to start any."""


@pytest.fixture
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "processes" not in request.fixturenames:
        monkeypatch.setattr(pipeline, "each", in_this_process)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Path, executor: None) -> PrepConfig:  # noqa: ARG001
    """Small sizes, so that a little text makes several units, members and shards."""
    (tmp_path / "input").mkdir()
    return PrepConfig(
        input=str(tmp_path / "input"),
        output=str(tmp_path / "output"),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        held_out_share=0.1,
        shard_bytes=20_000,
        member_bytes=4_000,
        unit_bytes=10_000,
        workers=1,
    )
