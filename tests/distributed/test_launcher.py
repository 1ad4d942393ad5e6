"""The ranks of one node meet whatever the machine is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatrain.errors import DONE
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
