"""`python -m megatrain.kernels.verify`, as it is typed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernels


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatrain.kernels.verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_interpreter_prints_errors_and_their_bounds() -> None:
    ended = verify("interpreter", "--kernel", "swiglu")
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
    first, second, *_ = ended.stdout.splitlines()
    number = r"\d\.\de-\d\d"
    assert re.fullmatch(rf"swiglu: 2x3x1, torch\.float32: 0 {number} \(1\.0e-06\)  gate_up {number} .*", first)
    assert second.startswith("swiglu: 2x3x1, torch.bfloat16: ")


def test_compilation_prints_resources() -> None:
    ended = verify("aot", "--kernel", "swiglu", "--target", "sm_90")
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
    header, forward, backward = ended.stdout.splitlines()
    assert header.split() == ["kernel", "target", "regs", "stack", "KiB", "instr"]
    assert re.fullmatch(r"swiglu forward +sm_90 +\d+ +0 +0\.0 +\d+  LDG=2 STG=1", forward)
    assert re.fullmatch(r"swiglu backward +sm_90 +\d+ +0 +0\.0 +\d+  LDG=3 STG=2", backward)
