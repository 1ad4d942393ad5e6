"""The strict interpreter: it sees what each of the faulty kernels does, and its bf16 is a GPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import InterpreterError

from megatrain.kernels.verify.case import Case, Work
from megatrain.kernels.verify.interpreter import bf16_to_fp32, check, fp32_to_bf16, watch
from megatrain.kernels.verify.measure import KernelError
from tests.kernels.verify import faulty

pytestmark = pytest.mark.kernels


def case(kernel: Any, truth: str = "copy", dtype: torch.dtype = torch.float32, in_place: bool = False) -> Case:
    """A kernel that ought to copy 10 elements, or to sum or double them, by three programs of 4."""

    def operation(x: Tensor) -> tuple[Tensor]:
        x = x.detach()
        y = x if in_place else torch.empty_like(x) if truth != "sum" else x.new_empty(3)
        kernel[(3,)](x, y, 10, BLOCK=16 if truth == "sum" else 4)
        return (y,)

    references = {"copy": lambda x: x.clone(), "double": lambda x: 2 * x, "sum": lambda x: x.sum().expand(3)}
    x = torch.randn(10, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Case(kernel.__name__, operation, lambda x: (references[truth](x),), {"x": x}, constant=frozenset({"x"}))


@pytest.mark.parametrize(
    ("faulty_case", "message"),
    [
        (case(faulty.beyond), "an address outside"),
        (case(faulty.unmasked, "sum"), "off by nan"),
        (case(faulty.unwritten), "off by nan"),
        (case(faulty.twice), "a double write"),
        (case(faulty.shifted, in_place=True), "a race: a program writes what another reads"),
        (case(faulty.atomic, "sum"), "an atomic operation"),
        (case(faulty.narrow, "double", torch.bfloat16), "arithmetic in bf16"),
        (case(faulty.narrow_sum, "sum", torch.bfloat16), "a reduction in bf16"),
        (case(faulty.narrow), "off by 1.00e"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_a_fault_is_seen(faulty_case: Case, message: str) -> None:
    with pytest.raises((KernelError, InterpreterError), match=message):
        check(faulty_case)


def test_what_is_right_passes() -> None:
    errors = check(case(faulty.narrow, "double"))
    assert {name: measured.kernel for name, measured in errors.items()} == {"0": 0.0}


def test_no_kernel_is_no_pass() -> None:
    eager = Case("eager", lambda x: (x + 1,), lambda x: (x + 1,), {"x": torch.zeros(2)})
    with pytest.raises(KernelError, match="no kernel was launched"):
        check(eager)


@given(st.lists(st.floats(width=32), min_size=1))
def test_casts_round_as_torch_does(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    expected = tensor.bfloat16()
    rounded = fp32_to_bf16(tensor.numpy())
    torch.testing.assert_close(
        torch.from_numpy(bf16_to_fp32(rounded)), expected.float(), rtol=0, atol=0, equal_nan=True
    )


def test_products_of_bf16_are_exact() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.empty(16, 16)
    with watch() as watching:
        faulty.product[(1,)](a, b, y, SIZE=16)
    assert watching.work == [Work(read=2 * 2 * 16 * 16, written=4 * 16 * 16, products=2 * 16**3)]
    np.testing.assert_allclose(y, a.double() @ b.double(), rtol=0, atol=1e-5)


def test_it_asks_for_the_interpreter() -> None:
    program = "from megatrain.kernels.verify.interpreter import watch\nwith watch(): pass"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stderr.splitlines()[-1] == (
        "RuntimeError: the interpreter is off: set TRITON_INTERPRET=1 before triton is imported"
    )
