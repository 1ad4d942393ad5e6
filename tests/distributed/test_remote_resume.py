"""A run whose machine is lost goes on from its copy in an object store: the real command against a real S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import newest, step_folder
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.errors import BAD_INPUT
from megatrain.observe.records import read
from megatrain.storage import listing, root
from tests.distributed.command import STEPS, curve, train
from tests.s3 import S3Server

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

Uninterrupted = Callable[..., Path]
ZERO3 = ("precision=fp32", "engine.zero_stage=3")


def test_a_killed_run_goes_on_from_its_copy_alone(
    small_set: Path, uninterrupted: Uninterrupted, tmp_path: Path, s3: S3Server
) -> None:
    expected = curve(uninterrupted(*ZERO3))
    url = f"{s3.new_bucket()}/run"
    keys = (*ZERO3, "saving.every=4", f"saving.remote={url}")
    run_dir, empty = tmp_path / "run", tmp_path / "empty"
    with train(small_set, run_dir, *keys) as command:
        command.wait_for(lambda: newest(empty, url)[0] is not None, "a copy of a checkpoint")
        command.kill()
    found, _ = newest(empty, url)
    assert found is not None
    step = CheckpointReader(found).state["step"]
    assert 0 < step < STEPS
    shutil.rmtree(run_dir)

    with train(small_set, run_dir, *keys) as command:
        command.succeed()
    assert curve(run_dir) == expected[step:]
    assert next((event["event"], event["step"]) for event in read(run_dir / "events.jsonl")) == ("resume", step)
    last = step_folder(root(url, "saving.remote"), STEPS)
    assert newest(empty, url) == (last, [])
    CheckpointReader(last).verify_all()
    assert listing(last) == listing(step_folder(run_dir, STEPS))


@pytest.mark.long
def test_another_layout_goes_on_from_the_copy(small_set: Path, tmp_path: Path, s3: S3Server) -> None:
    url = f"{s3.new_bucket()}/run"
    keys = ("precision=fp32", "saving.every=4", f"saving.remote={url}")
    with train(small_set, tmp_path / "first", *keys, "max_steps=4", "engine.zero_stage=3") as command:
        command.succeed()
    with train(small_set, tmp_path / "second", *keys, "max_steps=8", "engine=fsdp", processes=1) as command:
        command.succeed()
    assert [step for step, *_ in curve(tmp_path / "second")] == [5, 6, 7, 8]
    assert newest(tmp_path / "empty", url) == (step_folder(root(url, "saving.remote"), 8), [])


def test_a_bucket_that_is_not_there_ends_the_start(small_set: Path, tmp_path: Path, s3: S3Server) -> None:
    s3.new_bucket()
    with train(small_set, tmp_path / "run", "saving.remote=s3://nowhere/run") as command:
        finished = command.wait()
    assert finished.code == BAD_INPUT
    (line,) = finished.stderr.splitlines()
    assert line.startswith(
        "megatrain train: saving.remote=s3://nowhere/run: can't be written (s3://nowhere/run: missing"
    )
