"""What is said of a node by its nvidia-smi and dmesg, every fault included (data/README.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.doctor import gpu
from megatrain.doctor.finding import Finding
from megatrain.doctor.gpu import Gpu, Seen, Xid

DATA = Path(__file__).parent / "data"
UPTIME = 705_600.0


def seen(kind: str, on_bus: int = 8) -> Seen:
    """All that a node's programs say. kind: the end of the files' names."""

    def text(name: str) -> str:
        return (DATA / name).read_text()

    return Seen(
        on_bus,
        tuple(gpu.parse_gpus(text(f"gpus_h100{kind}.csv"))),
        gpu.parse_remapped(text(f"remapped_h100{kind}.csv")),
        gpu.parse_links(text(f"nvlink_h100{kind}.txt")),
        tuple(gpu.parse_xids(text("dmesg.txt"))) if kind else (),
        uptime=UPTIME,
    )


def problems(found: Iterator[Finding]) -> dict[str, str]:
    return {each.check: each.problem for each in found if each.problem is not None}


def test_a_gpu_is_read() -> None:
    first = seen("").gpus[0]
    uuid = "GPU-0a10e6e5-95f7-2785-ed63-6f6147f304f0"
    assert first == Gpu(0, uuid, "NVIDIA H100 80GB HBM3", "550.90.07", 0, 1980, (), 16, 16, 4, None)
    assert [each.index for each in seen("").gpus] == list(range(8))


def test_a_node_that_is_well() -> None:
    found = list(gpu.findings(seen(""), None, 24))
    assert problems(iter(found)) == {}
    assert [(each.check, each.value) for each in found] == [
        ("GPUs", "8: NVIDIA H100 80GB HBM3"),
        ("ECC", "8 of 8 well"),
        ("row remapping", "8 of 8 well"),
        ("clocks", "8 of 8 well"),
        ("PCIe", "8 of 8 well"),
        ("memory", "8 of 8 well"),
        ("NVLink", "18 links a GPU"),
        ("Xid errors", "0 in 24 h"),
    ]


def test_every_fault_is_named() -> None:
    assert problems(gpu.findings(seen("_sick"), None, 24)) == {
        "GPUs": "7 GPUs answer, 8 should",
        "ECC": "GPU 2: 3 uncorrected ECC errors since the last reset",
        "row remapping": "GPU 1: a row remapping waits for a reset; GPU 3: row remapping failed",
        "clocks": "GPU 4: hardware slowdown, hardware thermal",
        "PCIe": "GPU 5: 8 of 16 PCIe lanes",
        "memory": "GPU 6: 71234 MiB are in use by another process",
        "NVLink": "GPU 3: 16 of 18 NVLinks are up",
        "Xid errors": "0000:cb:00: Xid 74, NVLink error; 0000:db:00: Xid 79, fallen off the bus",
    }


def test_xids_are_read_with_their_time() -> None:
    found = list(gpu.parse_xids((DATA / "dmesg.txt").read_text()))
    assert [each.code for each in found] == [48, 31, 74, 79, 79]
    fatal = "NVLink: fatal error detected on link 4(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)"
    assert found[2] == Xid("0000:cb:00", 74, 703800.000417, f"pid=81234, name=python, {fatal}")
    (without_time,) = gpu.parse_xids("NVRM: Xid (0000:03:00): 14, Channel 00000001")
    assert without_time == Xid("0000:03:00", 14, 0.0, "Channel 00000001")


@pytest.mark.parametrize(("hours", "codes"), [(0.1, []), (0.2, [79]), (24, [74, 79]), (200, [48, 74, 79])])
def test_only_recent_xids_of_the_hardware_count(hours: float, codes: list[int]) -> None:
    """Xid 31 is a program's."""
    problem = problems(gpu.findings(seen("_sick"), None, hours)).get("Xid errors", "")
    assert [code for code in (31, 48, 74, 79) if f"Xid {code}," in problem] == codes


def test_a_log_that_cannot_be_read_is_said_and_no_problem() -> None:
    here = Seen(8, seen("").gpus, {}, {}, unreadable="dmesg: read kernel buffer failed: Operation not permitted")
    (found,) = (each for each in gpu.findings(here, None, 24) if each.check == "Xid errors")
    assert found.problem is None
    assert "Operation not permitted" in found.value


def test_gpus_that_should_be_there() -> None:
    assert list(gpu.findings(Seen(0), None, 24)) == []
    assert list(gpu.findings(Seen(0, failed="No devices were found"), None, 24)) == []
    assert "GPUs" not in problems(gpu.findings(seen("", on_bus=0), None, 24))
    assert problems(gpu.findings(Seen(0), 8, 24)) == {"GPUs": "0 GPUs answer, 8 should"}
    assert problems(gpu.findings(Seen(8, failed="nvidia-smi isn't installed"), None, 24)) == {
        "GPUs": "nvidia-smi doesn't answer for them: nvidia-smi isn't installed"
    }


def test_gpus_are_counted_on_the_pci_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("0000:1b:00.0", "0x10de", "0x030200"),
        ("0000:43:00.0", "0x10de", "0x030000"),
        ("0000:05:00.0", "0x10de", "0x068000"),
        ("0000:00:02.0", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert gpu.pci_gpus(tmp_path) == 2
    assert gpu.pci_gpus(tmp_path / "absent") == 0


SMI = """#!/bin/sh
case "$1" in
*clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2;;
--query-gpu=*) cat {data}/gpus_h100.csv;;
--query-remapped-rows=*) cat {data}/remapped_h100.csv;;
nvlink) cat {data}/nvlink_h100.txt;;
esac
"""
"""nvidia-smi of a driver before 535."""


def install(folder: Path, program: str, script: str) -> None:
    (folder / program).write_text(script)
    (folder / program).chmod(0o755)


def test_the_programs_are_asked_and_an_old_driver_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "nvidia-smi", SMI.format(data=DATA))
    install(tmp_path, "dmesg", f"#!/bin/sh\ncat {DATA}/dmesg.txt\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.look()
    assert found.failed is found.unreadable is None
    assert [len(each) for each in (found.gpus, found.remapped or {}, found.links or {}, found.xids)] == [8, 0, 8, 5]
    assert gpu.versions(found) == {
        "driver": "550.90.07",
        "GPU": "NVIDIA H100 80GB HBM3",
        "highest SM clock": "1980 MHz",
    }


def test_a_program_that_fails_is_told_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "nvidia-smi", "#!/bin/sh\necho 'No devices were found'; exit 6\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.look().failed == "No devices were found"
