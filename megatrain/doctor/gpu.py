"""The GPUs of a node by what nvidia-smi and the kernel's log say of them. No torch, no CUDA context.

Design choices:
- Programs are run in one place, `look`; everything else is functions of their output.
- At least as many GPUs are expected as the PCI bus shows; a container may hide the bus, and GPUs answer all the same.
- Of Xid errors those count for which NVIDIA's catalog wants a GPU reset, a node restarted or a connection looked at
  (https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html), not those that it ignores or puts down to a
  program; in the last hours: the log goes back to the boot, and a GPU that was reset since is well.
- What a GPU hasn't got (`[N/A]`) is no problem, what it should have and can't tell (`[GPU requires reset]`) is one.
- The clock of an idle GPU says nothing; why the clock is held down does (NVML's nvmlClocksEventReasons).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.doctor.finding import Finding

FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "clocks.max.sm",
    "clocks_event_reasons.active",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "memory.used",
)
"""What is asked of nvidia-smi for each GPU, in this order."""
OLD_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
"""What drivers before 535 call it."""
SLOWDOWNS = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
"""Bits of clocks_event_reasons.active under which a GPU is slower than it should be."""
HARDWARE_XIDS = {
    46: "GPU stopped processing",
    48: "double-bit ECC error",
    54: "auxiliary power isn't connected",
    62: "microcontroller halt",
    64: "row remapping failed",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained ECC error",
    109: "context switch timeout",
    110: "security fault",
    119: "GSP timeout",
    120: "GSP error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "GPU initialization failed",
    **dict.fromkeys(range(144, 151), "NVLink error"),
    151: "key rotation failed",
    155: "NVLink down",
    156: "resource retired",
    158: "GPU fatal timeout",
}
"""Xids after which the node needs an operator; 144 to 150 unless the line says `Nonfatal`."""
RECOVERY = re.compile(r"recovery action changed from .* to 0x\w+ \((.+)\)")
"""In the text of Xid 154: what the driver wants done."""
XID = re.compile(r"(?:\[\s*(\d+\.\d+)\].*?)?NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)[^)]*\): (\d+),?\s*(.*)")
"""Time since the boot, PCI address (behind it the MIG instance), code, text."""
ABSENT = ("[N/A]", "[Not Supported]")
"""What nvidia-smi prints for what a GPU hasn't got. Other brackets hold an error."""
OCCUPIED_MEGABYTES = 2048
"""Memory in use above which another process has the GPU; the driver's own is below."""
PCI = Path("/sys/bus/pci/devices")
SECONDS = 60.0
"""How long nvidia-smi may take; beside a GPU that hangs it may never answer."""


@dataclass(frozen=True)
class Gpu:
    """A line of nvidia-smi. Numbers are None where the GPU doesn't tell them; error: why it can't. memory_used: MiB."""

    index: int
    uuid: str
    name: str
    driver: str
    ecc_errors: int | None
    max_clock: int | None
    slowdowns: tuple[str, ...]
    pcie_width: int | None
    max_pcie_width: int | None
    memory_used: int | None
    error: str | None


@dataclass(frozen=True)
class Xid:
    """A line of the kernel's log. device: PCI address. since_boot: seconds. text: what it says after the code."""

    device: str
    code: int
    since_boot: float
    text: str


@dataclass(frozen=True)
class Seen:
    """Output of the programs. on_bus: GPUs on the PCI bus. unreadable: why the kernel's log wasn't read. uptime: s."""

    on_bus: int
    gpus: tuple[Gpu, ...] = ()
    remapped: Mapping[str, str] | None = None
    links: Mapping[int, tuple[float | None, ...]] | None = None
    xids: tuple[Xid, ...] = ()
    failed: str | None = None
    unreadable: str | None = None
    uptime: float = 0.0


def look() -> Seen:
    """Runs the programs. Raises nothing: what fails is in the answer."""
    on_bus = pci_gpus(PCI)
    if shutil.which("nvidia-smi") is None:
        return Seen(on_bus, failed="nvidia-smi isn't installed" if on_bus else None)
    try:
        gpus = tuple(parse_gpus(_query()))
        remapped = parse_remapped(_run("nvidia-smi", *_csv("remapped-rows", ROWS)))
        links = parse_links(_run("nvidia-smi", "nvlink", "--status"))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Seen(on_bus, failed=_one_line(error))
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    try:
        return Seen(on_bus, gpus, remapped, links, tuple(parse_xids(_run("dmesg"))), uptime=uptime)
    except (OSError, subprocess.SubprocessError) as error:
        return Seen(on_bus, gpus, remapped, links, unreadable=_one_line(error), uptime=uptime)


ROWS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")


def _query() -> str:
    said = _said(FIELDS)
    return _said([OLD_NAMES.get(name, name) for name in FIELDS]) if "not a valid field" in said else said


def _said(fields: Sequence[str]) -> str:
    """What nvidia-smi prints though it fails: beside the GPUs that answer a line that tells why."""
    try:
        return _run("nvidia-smi", *_csv("gpu", fields))
    except subprocess.CalledProcessError as error:
        if not error.stdout + error.stderr:
            raise
        return str(error.stdout + error.stderr)


def _csv(what: str, fields: Sequence[str]) -> tuple[str, str]:
    return f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return ended.stdout


def _one_line(error: Exception) -> str:
    said = [str(getattr(error, name, None) or "") for name in ("stdout", "stderr")]
    return " ".join((" ".join(said).strip() or str(error)).split())


def pci_gpus(devices: Path) -> int:
    """NVIDIA's display and 3D controllers among the PCI devices of a sysfs folder."""
    if not devices.is_dir():
        return 0
    kinds = [((each / "vendor").read_text(), (each / "class").read_text()) for each in devices.iterdir()]
    return sum(vendor.startswith("0x10de") and kind.startswith(("0x0300", "0x0302")) for vendor, kind in kinds)


def parse_gpus(output: str) -> Iterator[Gpu]:
    """Of nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits. Raises ValueError(line) for any other line."""
    for line in filter(None, map(str.strip, output.splitlines())):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(FIELDS) or not values[0].isdigit():
            raise ValueError(line)
        index, uuid, name, driver, _, _, reasons, _, _, _ = values
        ecc, clock, width, max_width, used = map(_number, (*values[4:6], *values[7:]))
        bits = int(reasons, 16) if reasons.startswith("0x") else 0
        slowdowns = tuple(reason for bit, reason in SLOWDOWNS.items() if bits & bit)
        errors = [value.strip("[]") for value in values if value.startswith("[") and value not in ABSENT]
        error = errors[0] if errors else None
        yield Gpu(int(index), uuid, name, driver, ecc, clock, slowdowns, width, max_width, used, error)


def _number(value: str) -> int | None:
    """None for `[N/A]` and other words."""
    return int(value) if value.isdigit() else None


def parse_remapped(output: str) -> dict[str, str]:
    """What is wrong with the remapped rows of a GPU, by uuid. Of nvidia-smi --query-remapped-rows=ROWS.

    Raises ValueError(line) for any other line.
    """
    wrong = {}
    for line in filter(None, map(str.strip, output.splitlines())):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(ROWS):
            raise ValueError(line)
        uuid, pending, failure = values
        if failure in ("1", "Yes"):
            wrong[uuid] = "row remapping failed"
        elif pending in ("1", "Yes"):
            wrong[uuid] = "a row remapping waits for a reset"
    return wrong


def parse_links(output: str) -> dict[int, tuple[float | None, ...]]:
    """GB/s of each NVLink of each GPU, by index; None: inactive. Of nvidia-smi nvlink --status."""
    links: dict[int, tuple[float | None, ...]] = {}
    index = -1
    for line in output.splitlines():
        if found := re.match(r"GPU (\d+):", line):
            index = int(found[1])
            links[index] = ()
        elif found := re.match(r"\s*Link \d+: (?:([\d.]+) GB/s|<inactive>)", line):
            links[index] += (float(found[1]) if found[1] else None,)
    return links


def parse_xids(output: str) -> Iterator[Xid]:
    """The Xid lines of dmesg. Lines without a time count as of the boot."""
    for line in output.splitlines():
        if found := XID.search(line):
            yield Xid(found[2], int(found[3]), float(found[1] or 0), found[4])


def findings(seen: Seen, expected: int | None, xid_hours: float) -> Iterator[Finding]:
    """What there is to say of a node's GPUs. expected: how many; None: as many as are on the PCI bus."""
    count = seen.on_bus if expected is None else expected
    if not (count or seen.gpus):
        return
    names = ", ".join(sorted({gpu.name for gpu in seen.gpus})) or "none"
    if seen.failed is not None:
        yield Finding("GPUs", f"{seen.on_bus} on the PCI bus", f"nvidia-smi doesn't answer for them: {seen.failed}")
        return
    wrong = [f"{len(seen.gpus)} GPUs answer, {count} should"] if len(seen.gpus) < count else []
    wrong += [f"GPU {gpu.index}: {gpu.error}" for gpu in seen.gpus if gpu.error]
    yield Finding("GPUs", f"{len(seen.gpus)}: {names}", "; ".join(wrong) or None)
    yield from _each("ECC", seen.gpus, _ecc)
    yield from _each("row remapping", seen.gpus, lambda gpu: (seen.remapped or {}).get(gpu.uuid))
    yield from _each("clocks", seen.gpus, lambda gpu: ", ".join(gpu.slowdowns) or None)
    yield from _each("PCIe", seen.gpus, _lanes)
    yield from _each("memory", seen.gpus, _occupied)
    yield _links(seen.links or {})
    yield _xids(seen, xid_hours)


def _each(check: str, gpus: Sequence[Gpu], problem_of: Callable[[Gpu], str | None]) -> Iterator[Finding]:
    """One finding for all GPUs."""
    problems = [f"GPU {gpu.index}: {problem}" for gpu in gpus if (problem := problem_of(gpu))]
    yield Finding(check, f"{len(gpus) - len(problems)} of {len(gpus)} well", "; ".join(problems) or None)


def _ecc(gpu: Gpu) -> str | None:
    return f"{gpu.ecc_errors} uncorrected ECC errors since the last reset" if gpu.ecc_errors else None


def _lanes(gpu: Gpu) -> str | None:
    if gpu.pcie_width is None or gpu.max_pcie_width is None or gpu.pcie_width >= gpu.max_pcie_width:
        return None
    return f"{gpu.pcie_width} of {gpu.max_pcie_width} PCIe lanes"


def _occupied(gpu: Gpu) -> str | None:
    used = gpu.memory_used or 0
    return f"{used} MiB are in use by another process" if used > OCCUPIED_MEGABYTES else None


def _links(links: Mapping[int, Sequence[float | None]]) -> Finding:
    """A GPU with fewer links up than its neighbours is cut off in part. A node without NVLink has none up."""
    up = {index: sum(speed is not None for speed in speeds) for index, speeds in links.items()}
    most = max(up.values(), default=0)
    cut = [f"GPU {index}: {count} of {most} NVLinks are up" for index, count in up.items() if count < most]
    return Finding("NVLink", f"{most} links a GPU" if most else "none", "; ".join(cut) or None)


def _xids(seen: Seen, hours: float) -> Finding:
    if seen.unreadable is not None:
        return Finding("Xid errors", f"the kernel's log can't be read: {seen.unreadable}")
    recent = [xid for xid in seen.xids if seen.uptime - xid.since_boot < hours * 3600]
    grave = {(xid.device, xid.code): what for xid in recent if (what := _grave(xid))}
    problem = "; ".join(f"{device}: Xid {code}, {what}" for (device, code), what in grave.items())
    return Finding("Xid errors", f"{len(recent)} in {hours:g} h", problem or None)


def _grave(xid: Xid) -> str | None:
    """What is wrong by an Xid; None: nothing that an operator has to act on."""
    if action := RECOVERY.search(xid.text):
        return None if action[1] == "None" else action[1]
    return None if "Nonfatal" in xid.text else HARDWARE_XIDS.get(xid.code)


def versions(seen: Seen) -> dict[str, str]:
    """Of the GPUs and their driver, for comparison between nodes; nothing without a GPU."""
    if not seen.gpus:
        return {}
    kinds = sorted({gpu.name for gpu in seen.gpus})
    clocks = sorted({str(gpu.max_clock) for gpu in seen.gpus})
    return {"driver": seen.gpus[0].driver, "GPU": ", ".join(kinds), "highest SM clock": f"{', '.join(clocks)} MHz"}
