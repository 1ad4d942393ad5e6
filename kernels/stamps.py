"""Stamps: which kernels have passed `verify device` on which kind of GPU. What chooses kernels goes by them.

Design choices:
- A stamp holds for one architecture, one version of triton, and the very bytes of the sources that make the kernel: its
  op.py and whatever that imports of this folder. Change any, and it has to pass again.
- Stamps are files beside the kernels, stamps.json, committed for machines that were measured. Where that folder can't
  be written (a container's image), MEGATRAIN_STAMPS names one that all nodes see: stamps are written there, and read in
  both. There is no cache in a home folder, for nodes that differ in it would run different kernels.
- Nothing but the standard library, so that a configuration can be checked where there is no torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PACKAGE = "megatrain.kernels"
VARIABLE = "MEGATRAIN_STAMPS"


@dataclass(frozen=True)
class Stamp:
    """That a kernel has passed.

    arch: "sm_90". triton, torch: versions. sources: source_hash. gpu: its name. date: "2026-11-22". shapes: how many
    random ones were right. milliseconds: of forward and backward pass at Llama 7B's shape, by implementation.
    """

    arch: str
    triton: str
    sources: str
    gpu: str
    torch: str
    date: str
    shapes: int
    milliseconds: dict[str, float]


def missing(kernel: str, arch: str) -> str | None:
    """Why a kernel can't be trusted on an architecture ("sm_90") with the installed triton, a sentence; None if it can.

    kernel: its folder's name.
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return f"{kernel} has no stamp, for triton isn't installed"
    how = f"run `python -m megatrain.kernels.verify device --kernel {kernel}` on such a GPU"
    stamps = [stamp for file in _files(kernel) for stamp in _read(file) if _key(stamp) == (arch, triton)]
    if not stamps:
        return f"{kernel} has no stamp for {arch} with triton {triton}: {how}"
    if source_hash(kernel) not in {stamp["sources"] for stamp in stamps}:
        return f"{kernel} has changed since its stamp for {arch} with triton {triton}: {how}"
    return None


def write(kernel: str, stamp: Stamp) -> Path:
    """Puts a stamp in the place of what was there for its architecture and triton; the file."""
    file = written_file(kernel)
    new = asdict(stamp)
    stamps = sorted([new, *(other for other in _read(file) if _key(other) != _key(new))], key=_key)
    file.parent.mkdir(parents=True, exist_ok=True)
    complete = file.with_suffix(f".{os.getpid()}")
    complete.write_text(json.dumps(stamps, indent=1) + "\n")
    complete.replace(file)  # Whoever reads sees the old file or the new one.
    return file


def written_file(kernel: str) -> Path:
    """Where a stamp is written: below MEGATRAIN_STAMPS where that is set, else beside the kernel."""
    return _files(kernel)[-1]


def require_writable(kernel: str) -> None:
    """Raises PermissionError where a stamp can't be written."""
    folder = written_file(kernel).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written; set {VARIABLE} to a folder for stamps that all nodes see")


def source_hash(kernel: str) -> str:
    """Of the bytes of a kernel's op.py and all that it imports of this folder, now or when it is called."""
    digest = hashlib.sha256()
    for file in sources(kernel):
        digest.update(f"{file.relative_to(FOLDER).as_posix()} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def sources(kernel: str) -> list[Path]:
    """The files that source_hash reads."""
    found: set[Path] = set()
    waiting = [FOLDER / kernel / "op.py"]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported(file)
    return sorted(found)


def _imported(file: Path) -> list[Path]:
    """The files of this folder that a file imports."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
    below = (module.removeprefix(f"{PACKAGE}.").split(".") for module in modules if module.startswith(f"{PACKAGE}."))
    files = (FOLDER.joinpath(*parts).with_suffix(".py") for parts in below)
    return [file for file in files if file.is_file()]


def _files(kernel: str) -> list[Path]:
    """Where a kernel's stamps may be; the last is where they are written."""
    own = os.environ.get(VARIABLE)
    return [FOLDER / kernel / "stamps.json", *([Path(own) / f"{kernel}.json"] if own else [])]


def _read(file: Path) -> list[dict[str, Any]]:
    """A file's stamps, as asdict gave them."""
    stamps: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return stamps


def _key(stamp: dict[str, Any]) -> tuple[str, str]:
    return stamp["arch"], stamp["triton"]
