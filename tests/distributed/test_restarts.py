"""One run at a time in a run directory; a crash starts the ranks again, the same crash again and again doesn't."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from megatrain.errors import BAD_INPUT, BUG, DONE, GAVE_UP, STOPPED
from megatrain.observe.records import read
from megatrain.resilience.lease import LEASE
from megatrain.resilience.outcome import read_outcome
from tests.distributed.command import ROOT, STEPS, Command, curve, keys, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

FP32 = ("precision=fp32", "engine.zero_stage=3", "saving.every=3")
HOST = re.escape(socket.gethostname())

RANK_1_FAILS_ITS_STEP_3 = """
import os

if os.environ.get("RANK") == "1":
    from megatrain.trainer import Trainer

    train_step = Trainer.train_step

    def failing(self, batch, began):
        if self.step == 2:
            raise RuntimeError("two halves make no whole")
        train_step(self, batch, began)

    Trainer.train_step = failing
"""


def happened(run_dir: Path, *kinds: str) -> list[str]:
    """The events of these kinds, in order."""
    return [str(e["event"]) for e in read(run_dir / "events.jsonl") if e["event"] in kinds]


def test_a_second_run_is_refused_and_a_killed_one_is_followed(small_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, "max_steps=100000") as first:
        first.wait_until(run_dir / "metrics.jsonl", lines=2)
        with train(small_set, run_dir) as second:
            refused = second.wait()
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "megatrain.train"]
        with Command([*torchrun, *keys(small_set, run_dir)], tmp_path) as third:
            also_refused = third.wait()
        assert (refused.code, also_refused.code) == (BAD_INPUT, BUG)  # torchrun makes 1 of every code.
        holder = f"process {first.process.pid} on {HOST} trains in it; legal: "
        line = f"megatrain train: run_dir={run_dir}: {holder}.*\n"
        assert re.fullmatch(line, refused.stderr), refused.stderr
        assert re.search(line, also_refused.stderr), also_refused.stderr
        first.kill()
    assert json.loads((run_dir / LEASE).read_bytes())["pid"] == first.process.pid
    with train(small_set, run_dir, "max_steps=100000") as fourth:
        fourth.wait_for(lambda: len(happened(run_dir, "start")) == 2, "training")
        fourth.process.send_signal(signal.SIGTERM)
        assert fourth.wait().code == STOPPED
    assert not (run_dir / LEASE).exists()
    assert happened(run_dir, "start", "crash", "stop") == ["start", "crash", "start", "stop"]


def test_ranks_start_again_in_place(small_set: Path, uninterrupted: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, *FP32, "resilience.restarts=1") as command:
        command.wait_until(run_dir / "metrics.jsonl", lines=5)
        command.ranks()[1].kill()
        finished = command.wait()
        assert command.left_over() == []
    killed = rf"megatrain train: rank 1 \({HOST}\) was killed by signal 9\n"
    assert re.fullmatch(f"{killed}megatrain train: restart 1 of 1\n", finished.stderr), finished.stderr
    assert finished.code == DONE
    assert curve(run_dir) == curve(uninterrupted(*FP32))
    assert happened(run_dir, "start", "crash", "resume", "stop") == ["start", "crash", "resume", "stop"]
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.exit_code, outcome.step) == (DONE, STEPS)


@pytest.mark.long
def test_ranks_of_two_nodes_start_again_in_place(small_set: Path, tmp_path: Path) -> None:
    """Two launchers here; that of the second node loses its rank."""
    run_dir = tmp_path / "run"
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    nodes = ("launch.nodes=2", f"launch.rendezvous=localhost:{port}", "resilience.restarts=1", *FP32)
    with ExitStack() as stack:
        commands = [stack.enter_context(train(small_set, run_dir, *nodes, processes=1)) for _ in range(2)]
        commands[0].wait_until(run_dir / "metrics.jsonl", lines=5)
        next(rank for command in commands for rank in command.ranks() if rank.environ()["RANK"] == "1").kill()
        ended = [command.wait() for command in commands]
        assert [command.left_over() for command in commands] == [[], []]
    assert [finished.code for finished in ended] == [DONE, DONE], ended
    assert happened(run_dir, "start", "crash", "resume", "stop") == ["start", "crash", "resume", "stop"]
    assert [step for step, *_ in curve(run_dir)] == list(range(1, STEPS + 1))


MEETS_FOR_HALF_A_MINUTE = """
from megatrain import launcher

launcher.AGAIN_SECONDS = 30
"""
"""After a crash launchers wait so long for those of the other nodes, in place of two minutes."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (0, "the launcher that keeps launch.rendezvous=localhost:{} is gone"),
        (1, "launch.nodes=2: not all came to localhost:{} in time"),
    ],
    ids=["that keeps the rendezvous", "other"],
)
def test_a_node_that_is_gone_ends_the_others(
    lost: int, reason: str, small_set: Path, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """A restart in place takes all nodes: the launcher that is left ends by itself; the next start goes on."""
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(MEETS_FOR_HALF_A_MINUTE)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    nodes = ("launch.nodes=2", f"launch.rendezvous=localhost:{port}", "resilience.restarts=1", *FP32)

    def meets(command: Command) -> bool:
        connections = psutil.Process(command.process.pid).net_connections()
        return any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in connections)

    with ExitStack() as stack:
        commands = []
        for _ in range(2):
            command = train(small_set, run_dir, *nodes, processes=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
            commands.append(stack.enter_context(command))
            commands[0].wait_for(lambda: meets(commands[0]), "the rendezvous")
        commands[0].wait_until(run_dir / "metrics.jsonl", lines=5)
        commands.pop(lost).kill()
        finished = commands[0].wait()
        assert commands[0].left_over() == []
    said = reason.format(port)
    assert (finished.code, finished.stderr.splitlines()[-1]) == (BUG, f"megatrain train: {said}")
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason) == (BUG, said)
    with train(small_set, run_dir, *FP32) as command:
        command.succeed()
    assert curve(run_dir) == curve(uninterrupted(*FP32))
    assert happened(run_dir, "start", "crash", "resume", "stop") == ["start", "crash", "resume", "stop"]


@pytest.mark.long
def test_a_crash_loop_ends_whoever_starts_it(small_set: Path, tmp_path: Path) -> None:
    """Once by hand, then twice in place. Who starts it after that has mended it."""
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(RANK_1_FAILS_ITS_STEP_3)

    def start(*overrides: str) -> Command:
        return train(small_set, run_dir, "saving.every=1", *overrides, PYTHONPATH=f"{tmp_path}:{ROOT}")

    with start() as command:
        assert command.wait().code == BUG
    with start("resilience.restarts=9") as command:
        finished = command.wait()
    last = f"rank 1 ({socket.gethostname()}): RuntimeError: two halves make no whole"
    loop = f"crash loop: died 3 times in a row at step 2, the last time because {last}"
    assert finished.code == GAVE_UP
    assert finished.stderr.count("restart 1 of 9\n") == 1
    assert finished.stderr.endswith(f"megatrain train: {loop}\n")
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason) == (GAVE_UP, loop)
    assert happened(run_dir, "start", "resume", "crash", "stop") == [
        *("start", "crash"),
        *("resume", "crash"),
        *("resume", "crash"),
        "stop",
    ]
    with train(small_set, run_dir) as command:
        command.succeed()
