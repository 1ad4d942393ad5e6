"""Memory between bands, and the bounds of errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatrain.kernels.verify.case import Case
from megatrain.kernels.verify.measure import Banded, KernelError, banded_allocations, compare, run_banded

BAND = 64


def test_a_touched_band_is_seen() -> None:
    banded = Banded(torch.arange(6.0).view(2, 3).as_strided((2, 2), (3, 1)))
    banded.tensor.fill_(1)
    assert banded.intact()
    banded.storage[BAND + 2] = 0  # Between the rows.
    assert not banded.intact()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(2, 3),
        lambda _: torch.empty(2, 3),
    ],
)
def test_what_an_operation_allocates_has_bands(allocate: Callable[[Tensor], Tensor]) -> None:
    before = torch.empty_like, torch.empty, torch.Tensor.new_empty
    with banded_allocations():
        y = allocate(torch.zeros(2, 3))
        assert y.shape == (2, 3)
        assert y.isnan().all()
        y.fill_(1)
    with pytest.raises(KernelError, match="around an output"), banded_allocations():
        allocate(torch.zeros(2, 3)).as_strided((7,), (1,)).fill_(1)
    assert (torch.empty_like, torch.empty, torch.Tensor.new_empty) == before


def test_an_operation_that_writes_around_its_input_is_seen() -> None:
    case = Case("fill", lambda x: (x.detach().as_strided((3,), (1,)).fill_(0),), lambda x: (x,), {"x": torch.ones(2)})
    with pytest.raises(KernelError, match="memory around x was written"):
        run_banded(case)


def test_errors_and_bounds() -> None:
    """A sum of squares and its gradient; in fp32 one number is the bound, in bf16 what PyTorch's has."""
    square = Case(
        "square", lambda x: (x.square().sum(),), lambda x: (x.square().sum(),), {"x": torch.arange(1.0, 65.0) / 7}
    )
    errors = compare(square, [run_banded(square), run_banded(square)])
    assert set(errors) == {"0", "x"}
    assert all(error.kernel == error.eager and error.bound == 1e-6 for error in errors.values())
    narrow = Case("narrow", square.operation, square.reference, {"x": square.inputs["x"].bfloat16()})
    error = compare(narrow, [run_banded(narrow)])["x"]
    assert error.bound == pytest.approx(1.25 * max(error.eager, error.least, 1e-6 / 1.25))
    off = Case("off", lambda x: (x.square().sum() * 1.5,), square.reference, narrow.inputs)
    with pytest.raises(KernelError, match=r"0 is off by [45]\.\d+e-01, above"):
        compare(off, [run_banded(off)])


def test_other_bits_are_seen() -> None:
    case = Case("same", lambda x: (2 * x,), lambda x: (2 * x,), {"x": torch.ones(3)})
    again = run_banded(case)
    again["x"] = again["x"].nextafter(torch.zeros(3))
    with pytest.raises(KernelError, match="x has other bits when run again"):
        compare(case, [run_banded(case), again])
