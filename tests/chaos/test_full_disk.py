"""A disk that fills up while the real command saves, and is freed again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import scan
from megatrain.observe.records import Record, read
from tests.chaos.runs import STEPS, Reference, start

MEGABYTE = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB, which three checkpoints fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def events(run_dir: Path, kind: str) -> list[Record]:
    return [event for event in read(run_dir / "events.jsonl") if event["event"] == kind]


def test_the_run_goes_on_without_a_checkpoint_until_there_is_space(small_disk: Path, reference: Reference) -> None:
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(20 * MEGABYTE))
    saving = ("saving.every=6", "saving.retries=1", "saving.retry_seconds=0.1")
    with start(reference.data, run_dir, *saving) as command:
        command.wait_for(lambda: bool(events(run_dir, "save_failed")), "a save that fails")
        assert scan(run_dir) == []
        ballast.unlink()
        finished = command.wait()
    assert finished.code == 0, finished
    failed, saved = events(run_dir, "save_failed"), events(run_dir, "save")
    assert [event["step"] for event in failed + saved] == [6, 12, 18, 24]
    assert failed[0]["attempts"] == 2
    warnings = finished.stderr.splitlines()
    assert len(warnings) == len(failed)
    assert "step_00000006: not saved: rank " in warnings[0]
    assert "No space left on device; the run goes on" in warnings[0]
    assert reference.check(run_dir) == STEPS
