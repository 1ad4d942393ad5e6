"""Saving on all ranks together, and what is found after a failure or a death."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatrain.checkpoint.folders import newest, resolve, scan, step_folder
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.engines.ranges import MASTER, Shard
from megatrain.errors import GaveUp, InputError
from megatrain.resilience.agreement import Agreement
from tests.checkpoint.layouts import even_layout, on_threads, random_whole, trainer_state
from tests.distributed.pool import Pool

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (50, 20), "head": (20, 50)}
WHOLE = random_whole(SHAPES)
ROOT = Path(__file__).parents[2]
AgreeOfThreads = Callable[[str | None], str | None]


def save(run_dir: Path, step: int) -> Path:
    return CheckpointManager(run_dir).save(step, even_layout(SHAPES, 1).shards(0, WHOLE), trainer_state(step))


def test_a_save_by_four_ranks_is_whole(tmp_path: Path) -> None:
    layout = even_layout(SHAPES, 4)

    def rank_main(rank: int, agree: AgreeOfThreads) -> Path:
        manager = CheckpointManager(tmp_path, rank, 4, agree)
        assert manager.clean() == []
        return manager.save(100, layout.shards(rank, WHOLE), trainer_state(100))

    assert on_threads(4, rank_main) == [tmp_path / "checkpoints" / "step_00000100"] * 4
    reader = CheckpointReader(tmp_path / "checkpoints" / "step_00000100")
    reader.verify_all()
    assert torch.equal(
        reader.read(MASTER, "head", 0, 1000).view(torch.int32), WHOLE["head"][MASTER].flatten().view(torch.int32)
    )


def failing_shards(error: Exception) -> Iterator[Shard]:
    yield from even_layout(SHAPES, 1).shards(0, WHOLE)
    raise error


@pytest.mark.parametrize("where", [0, 2])
def test_a_rank_that_cannot_write_ends_the_save_on_all(tmp_path: Path, where: int) -> None:
    save(tmp_path, 50)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rank_main(rank: int, agree: AgreeOfThreads) -> str:
        manager = CheckpointManager(tmp_path, rank, 3, agree)
        shards = failing_shards(full) if rank == where else iter(even_layout(SHAPES, 3).shards(rank, WHOLE))
        with pytest.raises(GaveUp) as raised:
            manager.save(100, shards, trainer_state(100))
        return str(raised.value)

    folder = step_folder(tmp_path, 100)
    said = f"{folder}: not saved: rank {where}: [Errno 28] No space left on device"
    assert on_threads(3, rank_main) == [said] * 3
    assert not folder.exists()
    assert newest(tmp_path) == (step_folder(tmp_path, 50), [])


def test_a_bug_stays_a_bug_on_its_rank_and_hangs_no_other(tmp_path: Path) -> None:
    def rank_main(rank: int, agree: AgreeOfThreads) -> type[BaseException]:
        shards = failing_shards(KeyError("w")) if rank == 1 else iter(even_layout(SHAPES, 2).shards(rank, WHOLE))
        with pytest.raises(Exception, match="w") as raised:
            CheckpointManager(tmp_path, rank, 2, agree).save(1, shards, trainer_state(1))
        return raised.type

    assert on_threads(2, rank_main) == [GaveUp, KeyError]


def test_inexact_coverage_fails_on_all_ranks(tmp_path: Path) -> None:
    def rank_main(rank: int, agree: AgreeOfThreads) -> str:
        shards = even_layout(SHAPES, 3).shards(rank, WHOLE)
        with pytest.raises(GaveUp) as raised:
            CheckpointManager(tmp_path, rank, 2, agree).save(1, shards, trainer_state(1))
        return str(raised.value)

    said = on_threads(2, rank_main)
    assert said[0] == said[1]
    assert "no rank holds 666 to 1000 of 1000" in said[0]
    assert scan(tmp_path) == []


def test_newest_passes_over_what_is_not_whole_and_says_why(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    for step in (9, 10, 11, 12):
        save(tmp_path, step)
    (step_folder(tmp_path, 12) / "commit.json").unlink()
    os.truncate(step_folder(tmp_path, 11) / "rank_00000.bin", 5)
    found, passed_over = newest(tmp_path)
    assert found == step_folder(tmp_path, 10)
    assert [line.removeprefix(f"{tmp_path}/checkpoints/") for line in passed_over] == [
        "step_00000012: uncommitted (it has no commit.json)",
        "step_00000011/rank_00000.bin: 5 bytes, 24000 were written",
    ]


def test_going_back_loads_an_older_one_and_those_after_it_are_gone(tmp_path: Path) -> None:
    for step in (9, 10, 11, 12):
        save(tmp_path, step)
    with (step_folder(tmp_path, 10) / "rank_00000.bin").open("r+b") as data:
        data.write(b"altered")
    manager, read = CheckpointManager(tmp_path), []
    reader, altered = manager.load(lambda reader: read.append(reader.read(MASTER, "head", 0, 3)), 11, lambda: None)
    assert reader is not None
    assert reader.state["step"] == 9
    assert len(altered) == 1
    assert len(read) == 2
    manager.remove_after(9)
    assert [found.step for found in scan(tmp_path)] == [9]
    assert manager.load(lambda _: None, before=9) == (None, [])


def test_clean_removes_only_what_was_never_committed(tmp_path: Path) -> None:
    for step in (10, 11, 12):
        save(tmp_path, step)
    (step_folder(tmp_path, 12) / "commit.json").unlink()
    (step_folder(tmp_path, 11) / "commit.json").write_text("{}")
    stray = tmp_path / "checkpoints" / "step_notes"
    stray.mkdir()
    assert CheckpointManager(tmp_path).clean() == [f"{step_folder(tmp_path, 12)}: uncommitted, removed"]
    assert stray.is_dir()
    assert [found.step for found in scan(tmp_path)] == [11, 10]


def test_a_step_saved_again_replaces_the_old_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    before = (folder / "commit.json").read_bytes()
    with pytest.raises(GaveUp, match="not saved"):
        CheckpointManager(tmp_path).save(10, failing_shards(OSError(5, "broken")), trainer_state(10))
    assert (folder / "commit.json").read_bytes() == before
    again: dict[str, tuple[int, ...]] = {"other": (3,)}
    CheckpointManager(tmp_path).save(10, even_layout(again, 1).shards(0, random_whole(again)), trainer_state(10))
    assert CheckpointReader(folder).shapes == again
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000010"]


def test_a_committed_step_survives_when_it_cannot_step_aside(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    (folder.parent / "step_00000010.replaced").touch()
    with pytest.raises(GaveUp, match="not saved: rank 0"):
        save(tmp_path, 10)
    CheckpointReader(folder).verify_all()


def test_resolve_takes_a_run_directory_or_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    assert resolve(tmp_path) == resolve(str(folder)) == folder
    (folder / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert resolve(tmp_path) == step_folder(tmp_path, 10)
    assert caplog.messages == [f"passed over: {folder / 'state.json'}: missing"]


def test_resolve_names_the_key_and_what_is_legal(tmp_path: Path) -> None:
    legal = r"give a run directory or the folder of a step in its checkpoints/$"
    with pytest.raises(InputError, match=rf"^checkpoint=/nowhere: no such folder; {legal}"):
        resolve("/nowhere")
    with pytest.raises(InputError, match=rf"holds no checkpoint; {legal}"):
        resolve(tmp_path)
    folder = save(tmp_path, 10)
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match=rf"index\.json: missing; {legal}"):
        resolve(folder)
    with pytest.raises(InputError, match=rf"holds no whole checkpoint; {legal}"):
        resolve(tmp_path)


@pytest.mark.parametrize("step", [2, 1], ids=["another step", "the same step again"])
def test_killed_before_any_call_that_changes_the_disk(tmp_path: Path, step: int) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.dying", str(tmp_path / "run"), str(step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    died, committed = map(int, done.stdout.split())
    assert died >= 25
    assert 0 < committed < died


def test_a_full_disk_ends_the_save_and_leaves_the_last_one(small_disk: Callable[[int], Path]) -> None:
    run_dir = small_disk(1 << 20)
    folder = save(run_dir, 10)
    large: dict[str, tuple[int, ...]] = {"w": (600, 600)}
    with pytest.raises(GaveUp, match=r"step_00000020: not saved: rank 0: \[Errno 28\] No space left on device"):
        CheckpointManager(run_dir).save(20, even_layout(large, 1).shards(0, random_whole(large)), trainer_state(20))
    assert [path.name for path in folder.parent.iterdir()] == ["step_00000010"]
    CheckpointReader(folder).verify_all()
    assert save(run_dir, 30).name == "step_00000030"


def cpu_store() -> TCPStore:
    """A store that rank 0 serves on a port that it tells the others over gloo."""
    if dist.get_rank() == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist.broadcast(torch.tensor(store.port), 0)
        return store
    port = torch.tensor(0)
    dist.broadcast(port, 0)
    return TCPStore("127.0.0.1", int(port), is_master=False)


def save_over_gloo(run_dir: str) -> tuple[str, str]:
    """One rank of two: a save that works, and one where only rank 1 fails."""
    rank = dist.get_rank()
    store = cpu_store()
    manager = CheckpointManager(Path(run_dir), rank, 2, Agreement(store, 2, "saving", timedelta(seconds=20)))
    manager.clean()
    shards = even_layout(SHAPES, 2).shards(rank, WHOLE)
    saved = manager.save(3, shards, trainer_state(3))
    error = ""
    try:
        manager.save(4, failing_shards(OSError(28, "full")) if rank == 1 else shards, trainer_state(4))
    except GaveUp as raised:
        error = str(raised)
    dist.barrier()
    return saved.name, error


@pytest.mark.distributed
def test_two_processes_save_together_and_fail_together(tmp_path: Path, pool: Pool) -> None:
    results = pool.run(save_over_gloo, ranks=2, run_dir=str(tmp_path))
    said = f"{step_folder(tmp_path, 4)}: not saved: rank 1: [Errno 28] full"
    assert results == [("step_00000003", said)] * 2
    CheckpointReader(step_folder(tmp_path, 3)).verify_all()
    assert [found.step for found in scan(tmp_path)] == [3]
