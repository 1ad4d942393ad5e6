"""Commands of tests that hang end as stacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.command import Command

HANGING = """
import subprocess, sys, time

def waiting_for_godot():
    time.sleep(60)

if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, *sys.argv, "child"])
with open(sys.argv[1], "a") as file:
    print("begun", file=file)
waiting_for_godot()
"""


WAYS: dict[str, Callable[[Command], object]] = {
    "wait": lambda command: command.wait(timeout=0.1),
    "wait_for": lambda command: command.wait_for(lambda: False, "nothing", timeout=0.1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_hang_shows_the_stacks_of_all_processes(way: str, tmp_path: Path) -> None:
    program, begun = tmp_path / "hanging.py", tmp_path / "begun"
    program.write_text(HANGING)
    with Command([str(program), str(begun)], tmp_path) as command:
        command.wait_until(begun, lines=2)
        with pytest.raises(AssertionError, match="still ") as failure:
            WAYS[way](command)
    assert str(failure.value).count(" in waiting_for_godot\n") == 2
