"""The parsers on what real machines printed: data/recorded, each file's source in data/README.md."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatrain.doctor import gpu
from megatrain.doctor.gpu import Seen

RECORDED = Path(__file__).parent / "data" / "recorded"


def text(name: str) -> str:
    return (RECORDED / name).read_text()


def problems(seen: Seen) -> dict[str, str]:
    return {each.check: each.problem for each in gpu.findings(seen, None, 24) if each.problem is not None}


FIRST = tuple(gpu.parse_gpus(text("gpus.csv")))[:1]


@pytest.mark.parametrize(("help_text", "renamed"), [("help_610.57.04.txt", {}), ("help_older.txt", gpu.OLD_NAMES)])
def test_every_field_is_one_that_the_driver_lists(help_text: str, renamed: dict[str, str]) -> None:
    listed = set(re.findall(r'"([^"]+)"', text(help_text)))
    assert {renamed.get(name, name) for name in gpu.FIELDS} <= listed


def test_gpus_of_five_drivers() -> None:
    read = list(gpu.parse_gpus(text("gpus.csv")))
    assert [(each.name, each.driver, each.ecc_errors, each.max_clock, each.memory_used) for each in read] == [
        ("NVIDIA H100 80GB HBM3", "590.48.01", 0, 1980, 0),
        ("NVIDIA H200", "590.48.01", 0, 1980, 32362),
        ("NVIDIA H100 80GB HBM3", "590.48.01", 0, 1980, 59),
        ("NVIDIA L40S", "595.80", 0, 2520, 0),
        ("NVIDIA GeForce RTX 4080 SUPER", "595.71.05", None, 3165, 596),
        ("NVIDIA GeForce RTX 2080 SUPER", "610.57.04", None, 2145, 211),
        ("A100-SXM4-40GB", "460.32.03", 0, 1410, 0),
    ]
    assert {(each.slowdowns, each.pcie_width, each.max_pcie_width, each.error) for each in read} == {((), 16, 16, None)}
    assert problems(Seen(7, tuple(read))) == {"memory": "GPU 0: 32362 MiB are in use by another process"}


def test_a_gpu_that_answers_with_an_error_is_a_problem() -> None:
    (read,) = gpu.parse_gpus(text("gpus_reset.csv"))
    assert (read.error, read.ecc_errors, read.slowdowns) == ("GPU requires reset", None, ())
    assert problems(Seen(1, (read,))) == {"GPUs": "GPU 0: GPU requires reset"}


@pytest.mark.parametrize("value", ["[N/A]", "N/A", "[Not Supported]"])
def test_what_a_gpu_does_not_have_is_no_error(value: str) -> None:
    (read,) = gpu.parse_gpus(text("gpus_reset.csv").replace("[GPU requires reset]", value))
    assert (read.error, read.ecc_errors) == (None, None)


@pytest.mark.parametrize("line", text("failures.txt").splitlines())
def test_what_nvidia_smi_says_instead_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Beside the GPUs that answer."""
    with pytest.raises(ValueError, match=re.escape(line)):
        gpu.parse_remapped(line)
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncat {RECORDED}/gpus.csv\necho "{line}"\nexit 255\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu.look().failed == line


def test_a_line_of_errors_is_no_gpu() -> None:
    """What nvidia-smi prints below `Unable to determine the device handle`."""
    errors = ", ".join(["[Unknown Error]"] * len(gpu.FIELDS))
    with pytest.raises(ValueError, match=re.escape(errors)):
        list(gpu.parse_gpus(errors))


def test_remapped_rows() -> None:
    assert gpu.parse_remapped(text("remapped.csv")) == {}
    assert gpu.parse_remapped(text("remapped_mig.csv")) == {}
    assert gpu.parse_remapped(text("remapped_pending.csv")) == {
        "GPU-00000000-0000-0000-0000-000000000001": "a row remapping waits for a reset"
    }


@pytest.mark.parametrize(
    ("machine", "links"),
    [
        ("h100", {0: (26.562,) * 18}),
        ("a100", {0: (25.0,) * 12, 1: (25.0,) * 12}),
        ("rtx2080", {0: ()}),
        ("l40s", {0: ()}),
        ("mig", {0: ()}),
    ],
)
def test_links(machine: str, links: dict[int, tuple[float, ...]]) -> None:
    assert gpu.parse_links(text(f"nvlink_{machine}.txt")) == links


def link_problem(*outputs: str) -> str | None:
    return problems(Seen(1, FIRST, links=gpu.parse_links("".join(outputs)))).get("NVLink")


def test_a_node_whose_links_are_down() -> None:
    """GPU 7 is gone, and with it the links of its neighbours."""
    assert link_problem(text("nvlink_v100.txt")) == (
        "GPU 3: 4 of 6 NVLinks are up; GPU 4: 5 of 6 NVLinks are up; "
        "GPU 5: 4 of 6 NVLinks are up; GPU 6: 5 of 6 NVLinks are up"
    )
    dark = text("nvlink_rtx2080.txt").replace("GPU 0:", "GPU 1:")
    assert link_problem(text("nvlink_h100.txt"), dark) == "GPU 1: 0 of 18 NVLinks are up"
    assert link_problem(text("nvlink_a100.txt")) is None


def test_xids_of_dmesg() -> None:
    assert [(each.device, each.code, each.since_boot) for each in gpu.parse_xids(text("dmesg.txt"))] == [
        ("0002:00:00", 119, 3606.832215),
        ("0000:0b:00", 109, 10900.272611),
        ("0000:01:00", 32, 24128.828315),
        ("0000:01:00", 31, 24128.834365),
        ("0009:01:00", 149, 171167.620236),
        ("0009:01:00", 154, 171167.621162),
        ("0019:01:00", 154, 171167.897562),
        ("0000:91:00", 79, 6781741.548779),
    ]


def test_xids_as_other_logs_print_them() -> None:
    read = list(gpu.parse_xids(text("kernel_log.txt")))
    assert [each.code for each in read] == [16, 8, 79, 43, 94, 119, 145, 149, 154, 62, 48, 171, 48, 63, 154]
    assert {each.device for each in read[:4]} == {"0000:01:00", "0000:a1:00", "0000:00:05"}
    assert {each.since_boot for each in read} == {0.0}


@pytest.mark.parametrize(
    ("log", "grave"),
    [
        (
            "dmesg.txt",
            "0002:00:00: Xid 119, GSP timeout; 0000:0b:00: Xid 109, context switch timeout; "
            "0009:01:00: Xid 149, NVLink error; 0009:01:00: Xid 154, Drain and Reset; "
            "0019:01:00: Xid 154, GPU Reset Required; 0000:91:00: Xid 79, fallen off the bus",
        ),
        (
            "kernel_log.txt",
            "0000:a1:00: Xid 79, fallen off the bus; 0000:9b:00: Xid 119, GSP timeout; "
            "0000:0b:00: Xid 154, GPU Reset Required; 0000:01:00: Xid 62, microcontroller halt; "
            "0000:55:00: Xid 48, double-bit ECC error; 0000:55:00: Xid 154, Drain and Reset",
        ),
    ],
)
def test_what_an_operator_has_to_act_on(log: str, grave: str) -> None:
    """Neither what programs do (8, 31, 43), nor what was contained or repaired (63, 94), nor links that go on (145)."""
    seen = Seen(1, FIRST, xids=tuple(gpu.parse_xids(text(log))))
    assert problems(seen)["Xid errors"] == grave


def test_the_hardware_xids_are_those_of_the_catalog() -> None:
    actions = {action: set(map(int, codes)) for action, *codes in map(str.split, text("xid_catalog.txt").splitlines())}
    needs_somebody = ("RESET_GPU", "RESTART_BM", "RESTART_VM", "CHECK_MECHANICALS")
    workflows = ("WORKFLOW_XID_48", "WORKFLOW_NVLINK_ERR", "WORKFLOW_NVLINK5_ERR")
    assert set(gpu.HARDWARE_XIDS) == set.union(*(actions[action] for action in needs_somebody + workflows))


def test_forms_of_the_driver_that_no_log_was_found_of() -> None:
    """After NVIDIA's page on memory errors (MIG), the kernel's CONFIG_PRINTK_CALLER, and Xid 154 turned round."""
    (partition,) = gpu.parse_xids(
        "NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9)."
    )
    assert (partition.device, partition.code) == ("0000:01:00", 94)
    (caller,) = gpu.parse_xids("[   60.100000][  T512] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.")
    assert caller.since_boot == 60.1
    changed = "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"
    recovered = gpu.parse_xids(f"[9.0] NVRM: Xid (PCI:0000:01:00): 154, {changed}")
    assert problems(Seen(1, FIRST, xids=tuple(recovered))) == {}
