"""Every kernel compiles for every target within its budget; and what isn't so is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatrain.kernels.verify import aot
from megatrain.kernels.verify.aot import Compiled, compile_all, complaints
from megatrain.kernels.verify.case import KERNELS, Compilation
from megatrain.kernels.verify.compiler import shortest_loop
from megatrain.kernels.verify.targets import MATRIX_PRODUCT, SPILL, TARGETS, WIDE_LOAD

pytestmark = pytest.mark.kernels

FAULTY = "tests.kernels.verify.faulty"
POINTERS = {"x": "*fp32", "y": "*fp32", "size": "i32"}
ALIGNED = ("size",)
RIGHT = Compilation("double", f"{FAULTY}:narrow", POINTERS, {"BLOCK": 512}, ALIGNED, instructions=(WIDE_LOAD,))
SPILLING = Compilation("center", f"{FAULTY}:spilling", POINTERS, {"BLOCK": 16384}, num_warps=1)
PRODUCT = Compilation("product", f"{FAULTY}:product", {"a": "*bf16", "b": "*bf16", "y": "*fp32"}, {"SIZE": 64})


@pytest.mark.timeout(600)  # All targets at once: three minutes of one core.
def test_every_kernel_keeps_to_its_budget() -> None:
    assert aot.run(KERNELS, TARGETS) == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_budgets_are_of_what_is_compiled(kernel: str) -> None:
    compiled = {(each.name, target) for target in TARGETS for each in aot.compilations(kernel, target)}
    assert {(name, target) for name, of_name in aot.budgets(kernel).items() for target in of_name} == compiled


def test_what_the_compiler_makes_is_read() -> None:
    """Without hardware: a kernel that spills has a stack; matrix products are each architecture's own instruction."""
    right, spilling, product = compile_all([RIGHT, SPILLING, PRODUCT], "sm_90")
    assert complaints(right, RIGHT, right.budget()) == []
    assert right.count("LDG.E.128") == 1
    assert spilling.stack > 0
    assert spilling.count("STL") > 0
    assert complaints(spilling, SPILLING, spilling.budget())[0].startswith("center, sm_90: it spills: a stack of ")
    assert product.count("HGMMA") > 0
    (product,) = compile_all([PRODUCT], "sm_80")
    assert product.count("HMMA") > 0
    assert product.count("HGMMA") == 0


def test_what_the_compiler_makes_for_amd_is_read() -> None:
    small = replace(RIGHT, num_warps=2)
    large = replace(small, wide_addresses=True)
    too_large = replace(SPILLING, constants={"BLOCK": 32768})  # A thread has up to 512 registers.
    right, wide, spilling, product = compile_all([small, large, too_large, PRODUCT], "gfx942")
    assert complaints(right, small, right.budget()) == []
    assert spilling.stack > 0
    assert spilling.does(SPILL) > 0
    assert product.does(MATRIX_PRODUCT) == product.count("v_mfma") > 0
    assert (right.count("buffer_load_dwordx4"), right.count("global_load_dwordx4")) == (1, 0)
    assert (wide.count("buffer_load_dwordx4"), wide.count("global_load_dwordx4")) == (0, 1)


def test_complaints() -> None:
    made = Compiled("k", "sm_80", registers=40, stack=0, shared=170_000, instructions={"LDG.E": 3, "HMMA.16816": 2})
    compilation = Compilation("k", "m:k", {}, {}, instructions=(WIDE_LOAD, MATRIX_PRODUCT))
    assert made.count("LDG") == 3
    assert complaints(made, compilation, {"registers": 39, "shared": 170_000, "instructions": 5}) == [
        "k, sm_80: 170000 bytes of shared memory, sm_80 has 166912",
        "k, sm_80: no 128-bit load (LDG.E.128)",
        "k, sm_80: 40 registers, the budget is 39",
    ]
    assert "no budget" in complaints(made, compilation, None)[-1]


def test_a_loop_may_not_issue_for_longer_than_it_multiplies() -> None:
    made = Compiled("k", "sm_80", registers=40, stack=0, shared=0, instructions={}, loop=300)
    fast, slow = (Compilation("k", "m:k", {}, {}, num_warps=8, loop_cycles=cycles) for cycles in (600, 599))
    assert complaints(made, fast, made.budget()) == []
    assert complaints(made, slow, made.budget()) == [
        "k, sm_80: its loop takes 600 cycles to issue, its matrix products 599"
    ]
    assert complaints(replace(made, loop=None), fast, made.budget()) != []


def instructions(*names: str) -> str:
    return "".join(f"        /*0000*/                   {name} ;\n" for name in names)


def test_the_shortest_loop_with_products_is_found() -> None:
    listing = instructions("MOV R1") + ".L_x_0:\n" + instructions("LDG.E R1") + ".L_x_1:\n"
    listing += instructions("HMMA.16816.F32 R1", "@P0 BRA `(.L_x_1)", "@!P1 BRA `(.L_x_0)") + ".L_x_2:\n"
    listing += instructions("@P0 BRA `(.L_x_2)", "BRA `(.L_x_3)") + ".L_x_3:\n" + instructions("EXIT")
    assert shortest_loop(listing) == 2
    assert shortest_loop(instructions("HMMA.16816.F32 R1", "EXIT")) is None


def test_without_products_it_is_the_shortest_that_is_more_than_a_jump() -> None:
    listing = ".L_x_0:\n" + instructions("FADD R1", "FADD R1", "@P0 BRA `(.L_x_0)") + ".L_x_1:\n"
    listing += instructions("FADD R1", "@P0 BRA `(.L_x_1)", "EXIT") + ".L_x_2:\n" + instructions("BRA `(.L_x_2)")
    assert shortest_loop(listing) == 2
    assert shortest_loop(listing + ".L_x_3:\n" + instructions("HMMA.16816.F32 R1", *2 * ["NOP"], "BRA `(.L_x_3)")) == 4


def test_a_compiler_that_fails_says_why() -> None:
    broken = Compilation("broken", f"{FAULTY}:narrow", {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 3, "size": 1})
    with pytest.raises(RuntimeError, match="power of 2"):
        list(compile_all([broken], "sm_80"))
