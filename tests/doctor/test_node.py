"""The checks of one node, on this one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatrain.__main__ import main
from megatrain.command_config import DoctorConfig
from megatrain.doctor import node
from megatrain.doctor.node import Report
from megatrain.errors import BAD_INPUT, DONE, GAVE_UP, GaveUp
from tests.distributed.command import keys, write_small_set
from tests.doctor.test_gpu import DATA, install

SICK = """#!/bin/sh
case "$1" in
--query-gpu=*) cat {data}/gpus_h100_sick.csv;;
esac
"""


def test_disk_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    found = node.disk(tmp_path / "runs" / "first", least_gigabytes=0)
    assert found.problem is None
    assert found.value.startswith(f"{tmp_path}: ")
    assert found.value.endswith(" GB/s")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_little_memory_are_problems(tmp_path: Path) -> None:
    assert (node.disk(tmp_path, 1e9).problem or "").endswith(" GB free, less than disk_gigabytes=1e+09")
    assert node.memory(8 * 10**9, 8).problem is None
    assert node.memory(8 * 10**9 - 1, 8.5).problem == (
        "8.0 GB of host memory available, less than memory_gigabytes=8.5"
    )


def test_a_disk_that_takes_nothing_is_a_problem() -> None:
    assert node.disk(Path("/proc"), 0).problem == "/proc can't be written: No such file or directory"


def test_a_report_travels_as_plain_values(tmp_path: Path) -> None:
    report = node.examine(DoctorConfig(path=str(tmp_path)))
    assert report.host == socket.gethostname()
    assert {"python", "torch", "kernel"} <= set(report.versions)
    assert Report.of(report.plain()) == report


def test_preflight_names_host_and_problem() -> None:
    with pytest.raises(GaveUp) as raised:
        node.preflight(Path("/proc/run"))
    assert str(raised.value) == (
        f"{socket.gethostname()} is not fit to train: /proc can't be written: No such file or directory "
        "(resilience.preflight=true)"
    )


def test_a_start_on_a_node_that_is_not_well_ends_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_small_set(tmp_path / "set")
    install(tmp_path, "nvidia-smi", SICK.format(data=DATA))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run_dir = tmp_path / "run"
    assert main(["train", *keys(data, run_dir, "launch.processes=2", "resilience.preflight=true")]) == GAVE_UP
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatrain train: {socket.gethostname()} is not fit to train: GPU 2: 3 uncorrected ECC ")
    assert not run_dir.exists()


def test_the_command_prints_a_table_and_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("doctor", "launch.processes=1", f"path={tmp_path}")
    assert main([*alone, "disk_gigabytes=0", "memory_gigabytes=0"]) == DONE
    assert "host memory" in capsys.readouterr().out
    assert main([*alone, "disk_gigabytes=1e9", "memory_gigabytes=0"]) == GAVE_UP
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"not well: {socket.gethostname()}: {tmp_path} has ")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("megabytes=0", "megabytes=0.0: legal: above 0"),
        ("launch.nodes=2", "launch.rendezvous=null: launch.nodes=2 need HOST:PORT to meet at"),
    ],
)
def test_bad_keys_are_one_line(argument: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", argument]) == BAD_INPUT
    assert capsys.readouterr().err == f"megatrain doctor: {line}\n"
