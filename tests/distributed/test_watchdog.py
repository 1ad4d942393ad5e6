"""Real runs with a rank that is stopped, hangs or is killed: the others end in time, and the one line names it.

A rank that the launcher sees die is in test_exit_codes.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatrain.errors import BUG
from megatrain.resilience.outcome import read_outcome
from tests.distributed.command import ROOT, Command, keys, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

TIMEOUT = 4.0
SLACK = 5.0
"""Seconds that the end may come later: the machine runs all commands at once."""
HOST = re.escape(socket.gethostname())
OVERRIDES = ("max_steps=1000000", f"resilience.timeout_seconds={TIMEOUT}", "resilience.heartbeat_seconds=0.25")

IN_STEP_6 = """
import os, time

rank, case = os.environ.get("RANK"), os.environ.get("CASE")
if rank == "1" and case == "reading":
    from megatrain.data import loader

    digest = loader.digest

    def hanging(n, ids):
        if n.max() >= 5 * 8:
            time.sleep(1000)
        return digest(n, ids)

    loader.digest = hanging

elif rank is not None and case is not None:
    import torch
    import torch.distributed as dist
    from megatrain.trainer import Trainer

    counts = Trainer._global_counts

    def counting(self, *arguments):
        counted = counts(self, *arguments)
        if self.step == 5 and case == "computing" and rank == "1":
            time.sleep(1000)
        elif self.step == 5 and case == "order":
            groups = [dist.new_group([0, 1]) for _ in range(2)]
            for group in groups if rank == "0" else reversed(groups):
                dist.all_reduce(torch.ones(4), group=group)
        return counted

    Trainer._global_counts = counting
"""
"""What goes wrong: rank 1 stops reading, or computing, or the ranks call two collectives in different orders."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watchdog")


def hanging(data: Path, folder: Path, case: str) -> Command:
    """A run in folder/case that hangs in step 6."""
    (folder / "sitecustomize.py").write_text(IN_STEP_6)
    return train(data, folder / case, *OVERRIDES, "engine=fsdp", CASE=case, PYTHONPATH=f"{folder}:{ROOT}")


@pytest.fixture(scope="module")
def commands(small_set: Path, folder: Path) -> Iterator[dict[str, Command]]:
    """The runs, side by side since most of it is waiting; each trains and then gets into trouble."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatrain.train"]
    commands = {
        "stopped": train(small_set, folder / "stopped", *OVERRIDES, "launch.max_idle_share=0.5", processes=3),
        "killed": Command([*torchrun, *keys(small_set, folder / "killed", *OVERRIDES)], folder),
        **{case: hanging(small_set, folder, case) for case in ("reading", "computing")},
    }
    with ExitStack() as stack:
        for command in commands.values():
            stack.enter_context(command)
        for name, command in commands.items():
            command.wait_until(folder / name / "metrics.jsonl", lines=5)
            if name == "stopped":
                command.ranks()[2].suspend()
            elif name == "killed":
                command.ranks()[1].kill()
        yield commands


def check(command: Command, run_dir: Path, reason: str, within: float, stacks_of: dict[int, str]) -> None:
    """How the command ended, what was said, how long after the last step, and the stacks of the ranks that could.

    stacks_of: a function in which each of them was.
    """
    finished = command.wait(timeout=25)  # Before the launcher would kill a stopped rank, after 30 seconds.
    assert command.left_over() == []
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (finished.code, outcome.exit_code) == (BUG, BUG)
    assert re.fullmatch(reason, outcome.reason), outcome.reason
    ours = [line for line in finished.stderr.splitlines() if "elastic" not in line]
    assert ours[0] == f"megatrain train: {outcome.reason}"
    assert len(ours) == 1 or "torch.distributed.run" in command.arguments, finished.stderr
    stacks = sorted((run_dir / "stacks").iterdir())
    assert [path.name for path in stacks] == [f"rank_{rank:05d}.txt" for rank in stacks_of]
    last_step = (run_dir / "metrics.jsonl").stat().st_mtime
    for path, function in zip(stacks, stacks_of.values(), strict=True):
        text = path.read_text()
        assert text.startswith(f"{outcome.reason}\n")
        assert f" in {function}\n" in text
        assert path.stat().st_mtime - last_step < within


def test_a_stopped_rank_is_named(commands: dict[str, Command], folder: Path) -> None:
    reason = (
        rf"rank 2 \({HOST}\) gave no sign of life for \d s, last seen .+ step \d+: "
        "process or node dead, stopped or cut off"
    )
    stacks_of = {0: "train_step", 1: "train_step", 2: "look"}
    check(commands["stopped"], folder / "stopped", reason, TIMEOUT + SLACK, stacks_of)


def test_a_rank_that_stops_reading_is_named_and_what_waits_for_it(commands: dict[str, Command], folder: Path) -> None:
    reason = (
        rf"rank 1 \({HOST}\) hung reading data for step 6 for \d s; the others waited, up to computing step 6, "
        r"in all_reduce \d+ of all ranks; likely storage"
    )
    check(commands["reading"], folder / "reading", reason, TIMEOUT + SLACK, {0: "train_step", 1: "hanging"})


def test_a_rank_that_hangs_beside_collectives_is_named(commands: dict[str, Command], folder: Path) -> None:
    """All ranks are at the same place by what they say of themselves."""
    reason = (
        rf"rank 1 \({HOST}\) hung computing step 6 for \d s; the others waited, in all_gather \d+ of all ranks; "
        "likely the device, or code that doesn't return"
    )
    check(commands["computing"], folder / "computing", reason, TIMEOUT + SLACK, {0: "train_step", 1: "counting"})


def test_torch_s_analyzer_reads_the_traces(commands: dict[str, Command], folder: Path) -> None:
    commands["computing"].wait(timeout=25)
    (hang,) = (folder / "computing" / "flight_recorder").iterdir()
    analyze = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(hang)]
    analyzed = subprocess.run(analyze, capture_output=True, text=True, timeout=60, check=True)
    said = analyzed.stdout + analyzed.stderr
    assert "collective: gloo:all_gather\nmissing ranks: {1}\n" in said
    assert "\nunshard at " in said, "which lines called it"


@pytest.mark.long
def test_collectives_in_different_orders_are_shown(small_set: Path, tmp_path: Path) -> None:
    waits = [rf"rank {rank} \({HOST}\) in all_reduce 1 of all ranks \(group \d+, 4 elements\)" for rank in (0, 1)]
    reason = rf"ranks wait in different collectives for \d s, computing step 6: {', '.join(waits)}; likely a bug in .+"
    with hanging(small_set, tmp_path, "order") as command:
        command.wait_until(tmp_path / "order" / "metrics.jsonl", lines=5)
        check(command, tmp_path / "order", reason, TIMEOUT + SLACK, {0: "counting", 1: "counting"})


def test_a_killed_rank_is_named_where_the_launcher_is_not_ours(commands: dict[str, Command], folder: Path) -> None:
    reason = rf"rank 1 \({HOST}\) died, last seen .+ step \d+"
    check(commands["killed"], folder / "killed", reason, SLACK, {0: "ask_who_is_gone"})
