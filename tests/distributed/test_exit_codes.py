"""Exit codes of `megatrain train` with two processes: 0, 2, 3 and 1; what the terminal and outcome.json say with them.

75 is in test_stop_and_continue.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.__main__ import main
from megatrain.checkpoint.folders import newest, step_folder
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.data.format import open_set
from megatrain.errors import BAD_INPUT, BUG, GAVE_UP
from megatrain.resilience.outcome import read_outcome
from tests.data.sets import flip_a_bit
from tests.distributed.command import EPOCH, ROOT, STEPS, Command, Finished, curve, keys, train, write_small_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

FP32 = ("precision=fp32", "engine.zero_stage=3")


def check_gave_up(finished: Finished, run_dir: Path) -> str:
    """Exit code 3, one line on the terminal, the same in outcome.json; the line."""
    assert finished.code == GAVE_UP, finished
    line = finished.stderr.removesuffix("\n")
    assert "\n" not in line
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert outcome.exit_code == GAVE_UP
    assert line == f"megatrain train: {outcome.reason}"
    return outcome.reason


def test_a_run_ends_where_its_data_end_with_everything_left_in_order(small_set: Path, tmp_path: Path) -> None:
    """With W&B as it is by default: offline, its service a process of its own."""
    run_dir = tmp_path / "run"
    half = (f"data.sources.text.path={small_set}", "data.sources.text.max_epochs=0.5", "data.path=null")
    steps = -(-EPOCH // 2 // 8)
    for _ in range(2):
        with train(small_set, run_dir, *half, "logger.wandb.mode=offline") as command:
            command.succeed()
            assert command.left_over() == []
        outcome = read_outcome(run_dir)
        assert outcome is not None
        assert (outcome.exit_code, outcome.reason) == (0, f"step {steps} of {STEPS}")
        assert [step for step, *_ in curve(run_dir)] == list(range(1, steps + 1))
    assert len(list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


IMPOSSIBLE = {
    "model.hiden_size=64": "model.hiden_size: no such key; did you mean model.hidden_size?",
    "max_steps=many": "max_steps=many",
    "model=huge": "model=huge: no such choice; legal: ",
    "data.path=/nowhere": "/nowhere: no train/manifest.json in it",
    "model.vocab_size=499": "model.vocab_size=499: the tokenizer of ",
    "model.num_heads=6": "model.num_heads=6: ",
    "model.num_kv_heads=3": "model.num_kv_heads=3: has to divide model.num_heads=4",
    "global_batch_size=1": "global_batch_size=1: 2 ranks need a sample each; legal: at least 2",
    "global_batch_size=5": "global_batch_size=5: leaves 37.5% of the slots of 2 ranks",
    "engine.zero_stage=0": "engine.zero_stage=0: not in bf16",
    "engine.bucket_elements=0": "engine.bucket_elements=0: legal: 1 or more",
    "parallel.tensor=3": "parallel.tensor=3: has to divide model.num_heads=4",
    "parallel.tensor=4": "parallel.tensor=4: its ranks have to be on one node, which has 2; legal: 2",
    "launch.nodes=2": "launch.rendezvous=null: launch.nodes=2 need HOST:PORT to meet at",
    "data.remote.retries=-1": "data.remote.retries=-1: legal: 0 or more",
    "data.cache.bytes=0": "data.cache.bytes=0: legal: above 0",
    "cluster.environment.LD_PRELOAD=a": "cluster.environment=LD_PRELOAD: legal: variables of NCCL, its libfabric",
    "launch.processes=0": "launch.processes=0: legal: above 0",
    "resilience.heartbeat_seconds=0": "resilience.heartbeat_seconds=0.0: legal: above 0",
    "resilience.timeout_seconds=15": "resilience.timeout_seconds=15.0: legal: at least 20.0, four resilience.heartbeat",
    "resilience.restarts=-1": "resilience.restarts=-1: legal: 0 or more",
    "resilience.crash_loop=-1": "resilience.crash_loop=-1: legal: 0 or more",
    "resilience.time_limit_seconds=0": "resilience.time_limit_seconds=0.0: legal: above 0",
}
"""Bad arguments, and how the line on the terminal begins."""


def said_before_the_start(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs `megatrain train` here, where it must end before any process is started; the one line it says."""
    assert main(["train", *arguments]) == BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    begin, _, line = said.err.removesuffix("\n").partition(": ")
    assert begin == "megatrain train"
    assert "\n" not in line
    return line


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_bad_configuration_is_one_line(
    override: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said_before_the_start([*keys(small_set, tmp_path / "run"), "launch.processes=2", override], capsys)
    assert line.startswith(IMPOSSIBLE[override])
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_waited_for_longer_than_a_rank_may_be_silent(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = keys(small_set, tmp_path / "run", "data.path=http://127.0.0.1:9/set", "data.remote.timeout_seconds=200")
    assert said_before_the_start(arguments, capsys) == (
        "data.remote.timeout_seconds=200.0: with data.remote.retries it is 1007.5 s until a server is given up; "
        "legal: less in all than resilience.timeout_seconds=600.0"
    )


@pytest.mark.parametrize("broken", ["missing", "of another size"])
def test_a_broken_set_is_one_line(broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_small_set(tmp_path / "set")
    shard = open_set(data).path(1)
    if broken == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-512])
    assert said_before_the_start(keys(data, tmp_path / "run"), capsys).startswith(f"{shard}: ")
    assert not (tmp_path / "run").exists()


def test_another_runs_directory_is_one_line_and_stays_as_it_is(
    small_set: Path, uninterrupted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = uninterrupted(*FP32)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    given = keys(small_set, run_dir, *FP32)
    for override, said in {
        "model.num_layers=3": f"model.num_layers=3: run_dir={run_dir} holds another model; legal: model.num_layers=2",
        "seed=1": "the checkpoint was trained on another order of samples: seed=1 (saved: 0)",
        "max_steps=20": f"max_steps=20: run_dir={run_dir} is at step 24 already",
    }.items():
        assert said_before_the_start([*given, override], capsys).startswith(said)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_the_process_itself_exits_with_2_and_one_line(small_set: Path, tmp_path: Path) -> None:
    for override in ("model.hiden_size=64", "data.path=/nowhere"):
        with train(small_set, tmp_path / "run", override) as command:
            finished = command.wait()
        assert (finished.code, finished.stdout) == (BAD_INPUT, "")
        assert finished.stderr.startswith(f"megatrain train: {IMPOSSIBLE[override]}")
        assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_the_device_has_not_is_one_line(small_set: Path, tmp_path: Path) -> None:
    with train(small_set, tmp_path / "run", "kernels.norm=triton") as command:
        finished = command.wait()
    line = "kernels.norm=triton: it needs a GPU, or TRITON_INTERPRET=1 to be tried; legal: auto, torch"
    assert (finished.code, finished.stdout, finished.stderr) == (BAD_INPUT, "", f"megatrain train: {line}\n")


def test_an_altered_member_ends_the_run_and_is_named(tmp_path: Path) -> None:
    data, run_dir = write_small_set(tmp_path / "set"), tmp_path / "run"
    shards = open_set(data)
    flip_a_bit(shards, shard=1, member=0)
    with train(data, run_dir) as command:
        finished = command.wait()
        assert command.left_over() == []
    reason = check_gave_up(finished, run_dir)
    member = shards.members(1)[0].name
    assert reason.startswith(f"{shards.path(1)}: member {member} was altered since it was written")


def test_a_disk_that_stays_full_ends_the_run_with_the_checkpoints_it_has(
    small_disk: Callable[[int], Path], small_set: Path, uninterrupted: Callable[..., Path]
) -> None:
    """It has room for three checkpoints of SMALL, not for four."""
    run_dir = small_disk(4 << 20) / "run"
    with train(small_set, run_dir, *FP32, "saving.every=4", "saving.retries=0") as command:
        finished = command.wait()
        assert command.left_over() == []
    full = r"not saved: rank \d: \[Errno 28\] No space left on device"
    goes_on = "".join(rf"{step_folder(run_dir, step)}: {full}; the run goes on\n" for step in (16, 20, 24))
    assert finished.code == GAVE_UP
    assert re.fullmatch(rf"{goes_on}megatrain train: {step_folder(run_dir, 24)}: {full}\n", finished.stderr)
    folder, passed_over = newest(run_dir)
    assert folder == step_folder(run_dir, 12)
    assert passed_over == []
    CheckpointReader(folder).verify_all()
    subprocess.run(["mount", "-o", "remount,size=64m", run_dir.parent], check=True)
    with train(small_set, run_dir, *FP32) as command:
        command.succeed()
    assert curve(run_dir) == curve(uninterrupted(*FP32))


BUG_AT_STEP_3 = """
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


def test_a_bug_on_one_rank_keeps_its_traceback_and_ends_all(small_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(BUG_AT_STEP_3)
    with train(small_set, run_dir, "logger.wandb.mode=offline", PYTHONPATH=f"{tmp_path}:{ROOT}") as command:
        finished = command.wait()
        assert command.left_over() == []
    assert finished.code == BUG
    assert finished.stderr.startswith("Traceback (most recent call last):")
    assert finished.stderr.endswith("RuntimeError: two halves make no whole\n")
    assert finished.stderr.count("Traceback") == 1, finished.stderr
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.exit_code, outcome.rank) == (BUG, 1)
    assert outcome.reason == f"rank {outcome.rank} ({socket.gethostname()}): RuntimeError: two halves make no whole"


def test_a_killed_rank_takes_the_others_along(small_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, "max_steps=2000") as command:
        command.wait_until(run_dir / "metrics.jsonl", lines=2)
        command.ranks()[1].kill()
        began = time.monotonic()
        finished = command.wait()
        assert time.monotonic() - began < 30
        assert command.left_over() == []
    reason = f"rank 1 ({socket.gethostname()}) was killed by signal 9"
    assert (finished.code, finished.stderr) == (BUG, f"megatrain train: {reason}\n")
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.exit_code, outcome.reason) == (BUG, reason)


def test_starting_ranks_end_when_their_launcher_is_killed(small_set: Path, tmp_path: Path) -> None:
    with train(small_set, tmp_path / "run") as command:
        command.wait_for(lambda: len(command.ranks()) == 2, "two ranks")
        command.process.kill()
        command.process.wait()
        assert command.left_over(patience=60) == []


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 1.0), (["train", "--help"], 5.0)])
def test_help_answers_at_once_and_without_torch(arguments: list[str], limit: float, tmp_path: Path) -> None:
    """The fastest of three: others may use the machine too."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        with Command(["-X", "importtime", "-m", "megatrain", *arguments], tmp_path) as command:
            finished = command.wait()
            seconds.append(time.monotonic() - began)
        assert finished.code == 0
        assert "megatrain" in finished.stdout
        imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
        assert "megatrain" in imported
        assert "torch" not in imported
    assert min(seconds) < limit
