"""A disk that fills up while the real command saves, and is freed again."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.checkpoint.folders import scan
from megatrain.observe.records import Record, read
from tests.chaos.runs import STEPS, Reference, injected, start
from tests.conftest import fill

pytestmark = pytest.mark.timeout(400)

MEGABYTE = 1 << 20
DISK = 24 * MEGABYTE
"""Three checkpoints fill it."""


def events(run_dir: Path, kind: str) -> list[Record]:
    return [event for event in read(run_dir / "events.jsonl") if event["event"] == kind]


def test_the_run_goes_on_without_a_checkpoint_until_there_is_space(
    small_disk: Callable[[int], Path], reference: Reference
) -> None:
    disk = small_disk(DISK)
    run_dir, ballast = disk / "run", disk / "ballast"
    ballast.write_bytes(bytes(DISK - 4 * MEGABYTE))
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


def test_records_wait_for_space(small_disk: Callable[[int], Path], reference: Reference, tmp_path: Path) -> None:
    """While a save holds what is left of the disk, training writes records."""
    disk, pause = small_disk(DISK), tmp_path / "pause"
    run_dir = disk / "run"
    environment = injected(run_dir, rank=0, point="before fsync step/rank_00000.bin", action="pause", pause=str(pause))
    with start(reference.data, run_dir, "saving.every=12", environment=environment) as command:
        command.wait_for(pause.exists, "a save")
        ballast = fill(disk)
        metrics = run_dir / "metrics.jsonl"
        size = -(-metrics.stat().st_size // mmap.PAGESIZE) * mmap.PAGESIZE  # The disk's blocks are pages.
        command.wait_for(lambda: metrics.stat().st_size == size, "a record that doesn't fit")
        time.sleep(1)
        ballast.unlink()
        pause.unlink()
        command.succeed()
    assert [event["step"] for event in events(run_dir, "save")] == [12, 24]
    assert reference.check(run_dir) == STEPS
