"""Which kernels may be trusted on which GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from megatrain.kernels import stamps
from megatrain.kernels.stamps import Stamp
from megatrain.kernels.verify.case import KERNELS

TRITON = version("triton")
HOW = "run `python -m megatrain.kernels.verify device --kernel swiglu` on such a GPU"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels without stamps, which is looked at in their place."""
    folder = tmp_path / "kernels"
    shutil.copytree(stamps.FOLDER, folder, ignore=shutil.ignore_patterns("stamps.json", "__pycache__"))
    monkeypatch.setattr(stamps, "FOLDER", folder)
    monkeypatch.delenv("MEGATRAIN_STAMPS", raising=False)
    return folder


def stamp(kernel: str = "swiglu") -> Stamp:
    sources = stamps.source_hash(kernel)
    return Stamp("sm_90", TRITON, sources, "NVIDIA H100", "2.13.0", "2026-11-22", 2000, {"megatrain": 1.5})


def test_a_kernel_is_trusted_where_it_has_a_stamp(folder: Path) -> None:
    assert stamps.missing("swiglu", "sm_90") == f"swiglu has no stamp for sm_90 with triton {TRITON}: {HOW}"
    file = stamps.write("swiglu", stamp())
    assert file == folder / "swiglu" / "stamps.json"
    assert stamps.missing("swiglu", "sm_90") is None
    assert stamps.missing("swiglu", "sm_80") == f"swiglu has no stamp for sm_80 with triton {TRITON}: {HOW}"
    assert stamps.missing("norm", "sm_90") is not None


@pytest.mark.parametrize("changed", ["swiglu/kernel.py", "swiglu/configs.py", "arguments.py"])
def test_other_sources_need_another_stamp(changed: str, folder: Path) -> None:
    stamps.write("swiglu", stamp())
    with (folder / changed).open("a") as file:
        file.write("\n")
    assert (
        stamps.missing("swiglu", "sm_90") == f"swiglu has changed since its stamp for sm_90 with triton {TRITON}: {HOW}"
    )


@pytest.mark.parametrize("changed", ["swiglu/verify.py", "swiglu/budgets.json", "norm/kernel.py"])
def test_what_is_no_part_of_a_kernel_changes_nothing(changed: str, folder: Path) -> None:
    stamps.write("swiglu", stamp())
    with (folder / changed).open("a") as file:
        file.write("\n")
    assert stamps.missing("swiglu", "sm_90") is None


def test_another_triton_needs_another_stamp(folder: Path) -> None:
    stamps.write("swiglu", replace(stamp(), triton="0.1"))
    assert stamps.missing("swiglu", "sm_90") == f"swiglu has no stamp for sm_90 with triton {TRITON}: {HOW}"
    stamps.write("swiglu", stamp())
    stamps.write("swiglu", replace(stamp(), date="2026-11-23"))
    written = json.loads((folder / "swiglu" / "stamps.json").read_text())
    assert [(s["triton"], s["date"]) for s in written] == [("0.1", "2026-11-22"), (TRITON, "2026-11-23")]


def test_stamps_of_ones_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go to MEGATRAIN_STAMPS, and count beside those of the package."""
    stamps.write("norm", stamp("norm"))
    monkeypatch.setenv("MEGATRAIN_STAMPS", str(tmp_path / "own" / "stamps"))
    assert stamps.write("swiglu", stamp()) == tmp_path / "own" / "stamps" / "swiglu.json"
    assert not (folder / "swiglu" / "stamps.json").exists()
    assert [stamps.missing(kernel, "sm_90") for kernel in ("norm", "swiglu")] == [None, None]


@pytest.mark.usefixtures("folder")
def test_without_triton_nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps.write("swiglu", stamp())

    def not_found(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(stamps, "version", not_found)
    assert stamps.missing("swiglu", "sm_90") == "swiglu has no stamp, for triton isn't installed"


@pytest.mark.parametrize("kernel", KERNELS)
def test_sources_are_the_operation_and_what_it_imports(kernel: str) -> None:
    names = {file.relative_to(stamps.FOLDER).as_posix() for file in stamps.sources(kernel)}
    assert {"arguments.py", *(f"{kernel}/{name}.py" for name in ("op", "kernel", "configs"))} <= names
    assert not any("verify" in name for name in names)
    assert ("attention/launch.py" in names) == (kernel == "attention")
