"""What can be told of one node alone: its disk, its memory, its software, its GPUs. No torch.

Design choices:
- A finding has a problem or it hasn't: nothing in between that everyone learns to overlook.
- What can't be looked at (no permission for the kernel's log) is said, and is no problem.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatrain.command_config import DoctorConfig
from megatrain.doctor import gpu
from megatrain.doctor.finding import Finding
from megatrain.errors import GaveUp
from megatrain.observe.events import versions

GIGABYTE = 10**9
PROBE_BYTES = 16 * 2**20
"""Written and synced to see whether and how fast the disk takes it."""


@dataclass(frozen=True)
class Report:
    """What was found on a node. versions: what has to be the same on all nodes, by name."""

    host: str
    findings: tuple[Finding, ...]
    versions: dict[str, str]

    def plain(self) -> dict[str, object]:
        """As JSON can say it."""
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> Report:
        """The reverse."""
        findings = tuple(Finding(**each) for each in plain["findings"])
        return Report(str(plain["host"]), findings, dict(plain["versions"]))


def examine(config: DoctorConfig) -> Report:
    """Looks at this node. Takes a second or two; starts nothing on a GPU."""
    gpus = gpu.look()
    findings = (
        disk(Path(config.path), config.disk_gigabytes),
        memory(psutil.virtual_memory().available, config.memory_gigabytes),
        *gpu.findings(gpus, config.gpus, config.xid_hours),
    )
    software = versions() | {"kernel": platform.release()} | gpu.versions(gpus)
    return Report(socket.gethostname(), findings, software)


def preflight(run_dir: Path) -> None:
    """The checks of this node before a start. Raises GaveUp, naming host and problems."""
    report = examine(DoctorConfig(path=str(run_dir)))
    if problems := [each.problem for each in report.findings if each.problem]:
        raise GaveUp(f"{report.host} is not fit to train: {'; '.join(problems)} (resilience.preflight=true)")


def disk(path: Path, least_gigabytes: float) -> Finding:
    """Room and speed where `path` lies, or will lie."""
    folder = next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(folder).free / GIGABYTE
    try:
        speed = f", written at {_write_speed(folder):.2f} GB/s"
    except OSError as error:
        return Finding("disk", f"{folder}: {free:.0f} GB free", f"{folder} can't be written: {error.strerror}")
    too_full = f"{folder} has {free:.1f} GB free, less than disk_gigabytes={least_gigabytes:g}"
    return Finding("disk", f"{folder}: {free:.0f} GB free{speed}", too_full if free < least_gigabytes else None)


def _write_speed(folder: Path) -> float:
    """GB/s to the disk itself. Raises OSError."""
    probe = folder / f".megatrain-doctor-{socket.gethostname()}-{os.getpid()}"
    data = os.urandom(PROBE_BYTES)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return PROBE_BYTES / GIGABYTE / (time.perf_counter() - began)
    finally:
        probe.unlink(missing_ok=True)


def memory(available: int, least_gigabytes: float) -> Finding:
    """Host memory that programs can have, in bytes."""
    gigabytes = available / GIGABYTE
    problem = f"{gigabytes:.1f} GB of host memory available, less than memory_gigabytes={least_gigabytes:g}"
    return Finding("host memory", f"{gigabytes:.0f} GB available", problem if gigabytes < least_gigabytes else None)
