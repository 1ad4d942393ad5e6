"""What tests of the command share: a set of shards, and runs that nothing interrupted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.command import train, write_small_set


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def uninterrupted(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """uninterrupted(*overrides): the directory of a run on two processes from start to end, made once."""

    @cache
    def run(*overrides: str) -> Path:
        run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
        with train(small_set, run_dir, *overrides) as command:
            command.succeed()
        return run_dir

    return run
