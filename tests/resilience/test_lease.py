"""lease.json: one run at a time in a run directory, whoever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatrain.errors import InputError
from megatrain.resilience.files import write_whole
from megatrain.resilience.lease import LEASE, Lease, start_name

BEAT = 0.05
WATCH = 1.0

Take = Callable[..., Lease]


@pytest.fixture
def take(tmp_path: Path) -> Iterator[Take]:
    """take(start): takes the lease of tmp_path as a launcher of that start does. All are released at the end."""
    leases: list[Lease] = []

    def take(start: str = "a", lost: Callable[[str], object] = pytest.fail) -> Lease:
        lease = Lease(tmp_path, start, lost, BEAT, WATCH)
        leases.append(lease)
        lease.take()
        return lease

    yield take
    for lease in leases:
        lease.release()


def leave_behind(run_dir: Path, pid: int, **changes: str) -> None:
    """A lease that nobody renews, in place of any that is there."""
    with tempfile.TemporaryDirectory() as folder:
        lease = Lease(Path(folder), "dead", pytest.fail)
        lease.take()
        text = json.loads((Path(folder) / LEASE).read_bytes())
        lease.release()
    write_whole(run_dir / LEASE, json.dumps(text | changes | {"pid": pid}).encode())


def pid_of_the_dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path, take: Take) -> None:
    first = take("a")
    assert (first.kept, first.dead) == (True, None)
    began = time.monotonic()
    with pytest.raises(InputError) as refused:
        take("b")
    assert time.monotonic() - began < WATCH
    who = f"process {os.getpid()} on {os.uname().nodename}"
    assert str(refused.value).startswith(f"run_dir={tmp_path}: {who}")
    first.release()
    assert not (tmp_path / LEASE).exists()
    second = take("b")
    assert (second.kept, second.dead) == (True, None)
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_launchers_of_a_start_share_it(take: Take) -> None:
    with ThreadPoolExecutor(4) as together:
        leases = list(together.map(take, ["same"] * 4))
    assert sorted(lease.kept for lease in leases) == [False, False, False, True]


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path: Path, take: Take) -> None:
    leave_behind(tmp_path, pid_of_the_dead())
    began = time.monotonic()
    lease = take()
    assert time.monotonic() - began < WATCH
    assert lease.kept
    assert lease.dead is not None
    assert lease.dead.start == "dead"


@pytest.mark.parametrize("start", ["a", "dead"])
def test_one_of_another_machine_is_watched(start: str, tmp_path: Path, take: Take) -> None:
    """Also where its process id lives here, and where it was of a start of the same name."""
    leave_behind(tmp_path, os.getpid(), machine="elsewhere", host="node7")
    began = time.monotonic()
    lease = take(start)
    assert time.monotonic() - began >= WATCH
    assert lease.kept
    assert lease.dead is not None
    assert lease.dead.host == "node7"


def test_of_many_that_find_a_dead_one_a_single_one_takes_it(tmp_path: Path, take: Take) -> None:
    leave_behind(tmp_path, os.getpid(), machine="elsewhere")

    def attempt(start: str) -> bool:
        try:
            return take(start).kept
        except InputError:
            return False

    with ThreadPoolExecutor(8) as together:
        assert sum(together.map(attempt, "abcdefgh")) == 1
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]


@pytest.mark.parametrize(("job", "requeues", "taken"), [("7", "1", True), ("7", "0", False), ("8", "1", False)])
def test_a_requeued_job_takes_it_from_its_former_start(
    job: str, requeues: str, taken: bool, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That lives on, on a node that Slurm can't reach; it has noticed before the later one goes on."""
    lines: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    take("first", lines.append)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", requeues)
    if not taken:
        with pytest.raises(InputError):
            take("second")
        return
    second = take("second")
    assert len(lines) == 1
    assert second.kept
    assert second.dead is not None
    assert second.dead.start == "first"


def test_a_damaged_one_is_watched(tmp_path: Path, take: Take) -> None:
    (tmp_path / LEASE).write_bytes(b"{")
    lease = take()
    assert (lease.kept, lease.dead) == (True, None)


def test_who_stood_still_too_long_is_told(tmp_path: Path, take: Take) -> None:
    told = threading.Event()
    lines: list[str] = []

    def lost(line: str) -> None:
        lines.append(line)
        told.set()

    lease = take("a", lost)
    leave_behind(tmp_path, 4242, host="node7")
    assert told.wait(10)
    assert len(lines) == 1
    assert lines[0].startswith(f"lost run_dir={tmp_path} to process 4242 on node7")
    lease.release()
    assert (tmp_path / LEASE).exists()


def test_a_file_that_was_removed_comes_back(tmp_path: Path, take: Take) -> None:
    take()
    (tmp_path / LEASE).unlink()
    ends = time.monotonic() + 10
    while not (tmp_path / LEASE).exists():
        assert time.monotonic() < ends
        time.sleep(BEAT)
    with pytest.raises(InputError):
        take("b")


def test_what_the_launchers_of_a_start_have_in_common() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert start_name(2, "node1:29500", job) == start_name(2, "node2:29500", job)
    assert start_name(2, None, job) != start_name(2, None, job | {"SLURM_RESTART_COUNT": "1"})
    assert start_name(2, None, job) != start_name(2, None, job | {"SLURM_STEP_ID": "1"})
    assert start_name(2, "node1:29500", {}) == start_name(2, "node1:29500", {})
    assert start_name(1, "node1:29500", job) != start_name(1, "node1:29500", job)
