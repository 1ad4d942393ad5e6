"""How ranks and launchers meet, and what is said where they don't."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatrain import launcher
from megatrain.config import LaunchConfig, TrainConfig
from megatrain.errors import BUG, DONE
from tests.distributed.command import Command, curve, keys

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

RENAMED = """
import ctypes, os, socket, sys

CLONE_NEWUTS = 0x4000000
assert ctypes.CDLL(None).unshare(CLONE_NEWUTS) == 0
socket.sethostname("name-of-nobody")
os.execv(sys.executable, [sys.executable, "-m", "megatrain", "train", *sys.argv[1:]])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a process gets a host name of its own only as root")
def test_a_machine_whose_name_does_not_resolve(small_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = keys(small_set, run_dir, "launch.processes=2", "max_steps=1", "engine=fsdp")
    with Command(["-c", RENAMED, *arguments], tmp_path) as command:
        finished = command.wait(timeout=120)
    assert finished.code == DONE, finished
    assert len(curve(run_dir)) == 1


def test_a_launcher_that_never_hears_what_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "AGAIN_SECONDS", 1)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    config = TrainConfig(launch=LaunchConfig(nodes=2, rendezvous=f"localhost:{port}"))
    launchers = launcher._Launchers(config, decides=False)
    failure, loop = launchers.agree(1, None)
    assert loop is None
    assert failure is not None
    assert (failure.exit_code, failure.reason) == (BUG, "the launcher that has the lease said nothing for 1 s")
