"""`megatrain train` from an HTTP server: the samples of a local set, and an end by name where the server stalls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.errors import GAVE_UP
from megatrain.resilience.outcome import read_outcome
from tests.data.http_server import Fault, Server, serve
from tests.distributed.command import curve, train, write_small_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

KEYS = ("precision=fp32", "engine.zero_stage=1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_small_set(tmp_path / "set")
    with serve(tmp_path) as server:
        yield server


def test_a_run_from_a_server_is_the_run_from_the_folder(server: Server, tmp_path: Path) -> None:
    with train(tmp_path / "set", tmp_path / "local", *KEYS) as command:
        command.succeed()
    remote = (f"data.path={server.url}/set", f"data.cache.path={tmp_path / 'cache'}")
    with train(tmp_path / "set", tmp_path / "remote", *KEYS, *remote) as command:
        command.succeed()
    assert curve(tmp_path / "remote") == curve(tmp_path / "local")
    fetched = [request for request in server.requests if "tar bytes" in request]
    assert len(fetched) == len(set(fetched)) > 1


def test_a_server_that_stalls_ends_the_run_by_name(server: Server, tmp_path: Path) -> None:
    server.spoil = lambda name, _: Fault.stall if name == "shard-000001.tar" else None
    limits = ("data.remote.timeout_seconds=2", "data.remote.retries=1", f"data.cache.path={tmp_path / 'cache'}")
    before = time.monotonic()
    with train(tmp_path / "set", tmp_path / "run", *KEYS, f"data.path={server.url}/set", *limits) as command:
        finished = command.wait()
        assert command.left_over() == []
    outcome = read_outcome(tmp_path / "run")
    assert outcome is not None
    assert (finished.code, outcome.exit_code) == (GAVE_UP, GAVE_UP)
    assert outcome.reason == (
        f"{server.url}/set/train/shard-000001.tar: no answer within 2.0 s (data.remote.timeout_seconds) "
        "(attempt 2 of 2, data.remote.retries)"
    )
    assert time.monotonic() - before < 100
