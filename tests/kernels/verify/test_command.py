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
    assert re.fullmatch(r"swiglu backward +sm_90 +\d+ +0 +0\.0 +\d+  LDG=3 STG=3", backward)


def test_the_roofline_is_a_table_of_predictions() -> None:
    ended = verify("roofline", "--kernel", "swiglu", "--target", "sm_90")
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
    gpu, _, shape, header, forward, *_ = ended.stdout.splitlines()
    assert gpu.startswith("H100 SXM (sm_90): 132 multiprocessors at 1.83 GHz, 989 TFLOP/s, 3.35 TB/s. A prediction: ")
    assert shape == "Llama 7B, 1 x 4096 tokens"
    assert header.split()[:5] == ["MB", "/least", "again", "GFLOP", "/least"]
    # 2 tensors in and one out, of 4096 x 11008 in 2 bytes, at 3.35 TB/s.
    assert re.fullmatch(r"swiglu forward +270\.5 +1\.000 +0\.0 +100% +80\.8 .* 80\.8  memory", forward)
