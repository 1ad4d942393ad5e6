"""`verify device`: whole in the interpreter, where the CPU stands in for the GPU; and as it is typed, on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest
import torch

from megatrain.device import CPU
from megatrain.kernels import stamps
from megatrain.kernels.swiglu import kernel as swiglu_kernel
from megatrain.kernels.swiglu.verify import case as swiglu_case
from megatrain.kernels.verify.case import KERNELS, Shape, verifiable
from megatrain.kernels.verify.device import Machine, Steps, check, verify
from megatrain.kernels.verify.interpreter import watch
from megatrain.kernels.verify.measure import KernelError
from tests.kernels.verify import faulty

TINY = Shape(batch=1, length=40, hidden=64, heads=2, kv_heads=2, head_dim=32, intermediate=96, vocabulary=100)
SIZE = 2**11
ARCHITECTURE = "interpreter"


def stopwatch(steps: Steps) -> dict[str, list[float]]:
    seconds = {}
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        seconds[name] = [time.perf_counter() - began]
    return seconds


MACHINE = Machine(CPU, ARCHITECTURE, "CPU", stopwatch, nullcontext)


@pytest.fixture(autouse=True)
def own_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRAIN_STAMPS", str(tmp_path / "stamps"))
    return tmp_path / "stamps"


def verify_here(kernel: str, shapes: int, stamp: bool = True) -> list[str]:
    with watch():  # For its bf16, and for races.
        return verify(kernel, MACHINE, shapes, seed=0, stamp=stamp, size=SIZE, model=TINY)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_passes_is_stamped(kernel: str, own_stamps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_here(kernel, shapes=6) == []
    assert stamps.missing(kernel, ARCHITECTURE) is None
    (stamp,) = json.loads((own_stamps / f"{kernel}.json").read_text())
    assert stamp["shapes"] == 6
    assert set(stamp["milliseconds"]) >= {"megatrain", "torch"}
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert re.match(rf"{kernel}: 6 shapes are right; the worst has 0\.\d\d of its bound: ", first)
    row = rf"{kernel}, .* (forward|both) +(megatrain|torch) +\d+\.\d{{3}} ms \(.* to .*\) +\d+\.\d (GB|TFLOP)/s"
    assert [bool(re.fullmatch(row, line)) for line in rows[:4]] == [True] * 4
    assert last == f"{kernel}: stamped in {own_stamps / kernel}.json"


@pytest.mark.kernels
def test_a_kernel_that_is_wrong_is_not(
    own_stamps: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swiglu_kernel, "forward", faulty.swiglu_of_narrow_rows)
    *found, last = verify_here("swiglu", shapes=12)
    assert len(found) == 5
    for line in found:
        wrong = re.fullmatch(r"swiglu: shape (\d+) of seed 0, 2x\d+x(\d+), .*: 0 is off by .*, above .*", line)
        assert wrong
        assert int(wrong[2]) > 10
        name = verifiable("swiglu").random_case(Random(f"swiglu 0 {wrong[1]}"), SIZE).name
        assert name in line
    assert re.fullmatch(r"swiglu: \d+ of 12 shapes are wrong", last)
    assert not own_stamps.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.kernels
def test_a_write_around_an_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the strict interpreter sees: as on a GPU."""
    case = swiglu_case(torch.Generator().manual_seed(0), 1, 10, torch.float32)
    assert check(case, MACHINE) <= 1
    monkeypatch.setattr(swiglu_kernel, "forward", faulty.swiglu_beyond)
    with pytest.raises(KernelError, match="memory around an output was written"):
        check(case, MACHINE)


@pytest.mark.kernels
def test_no_stamp_where_none_is_wanted(own_stamps: Path) -> None:
    assert verify_here("swiglu", shapes=1, stamp=False) == []
    assert not own_stamps.exists()


def verify_device(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatrain.kernels.verify", "device", *arguments]
    environment = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False, env=environment)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "it needs a GPU that Triton compiles for, and there is none here"),
        (("--shapes", "999"), "--shapes 999: a stamp takes at least 1000; fewer go with --no-stamp"),
    ],
    ids=["no GPU", "few shapes"],
)
def test_what_cannot_be_verified_is_one_line(arguments: tuple[str, ...], error: str) -> None:
    ended = verify_device(*arguments, CUDA_VISIBLE_DEVICES="")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"verify device: {error}\n")


def test_a_place_for_stamps_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    ended = verify_device(MEGATRAIN_STAMPS=str(file / "stamps"))
    error = f"{file} can't be written; set MEGATRAIN_STAMPS to a folder for stamps that all nodes see"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"verify device: {error}\n")


@pytest.mark.gpu
@pytest.mark.timeout(1500)
def test_every_kernel_on_a_gpu(own_stamps: Path) -> None:
    ended = verify_device("--shapes", "50", "--no-stamp")
    assert ended.returncode == 0, ended.stderr
    for kernel in KERNELS:
        assert f"{kernel}: 50 shapes are right; " in ended.stdout
    assert not own_stamps.exists()


@pytest.mark.gpu
def test_what_is_interpreted_says_nothing_of_a_gpu() -> None:
    ended = verify_device(TRITON_INTERPRET="1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("verify device: unset TRITON_INTERPRET: ")
