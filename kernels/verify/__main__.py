"""Kernels checked without a GPU, and on one.

    python -m megatrain.kernels.verify interpreter [--kernel norm] [--seed 0]
    python -m megatrain.kernels.verify aot [--kernel norm] [--target sm_90] [--update]
    python -m megatrain.kernels.verify roofline [--kernel norm] [--target sm_90]
    python -m megatrain.kernels.verify device [--kernel norm] [--shapes 2000] [--seed 0] [--no-stamp]

Prints a line for each case or compilation; exits 1 where one is wrong, 2 where it can't be looked at.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from megatrain.kernels.verify import aot, device, roofline
from megatrain.kernels.verify.case import KERNELS, verifiable
from megatrain.kernels.verify.measure import KernelError
from megatrain.kernels.verify.targets import TARGETS


def interpreter(kernel: str, seed: int) -> list[str]:
    """Runs a kernel's cases; what is wrong, a line each."""
    # Here, for triton reads the variable when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.errors import InterpreterError

    from megatrain.kernels.verify.interpreter import check

    found = []
    for case in verifiable(kernel).cases(torch.Generator().manual_seed(seed)):
        try:
            measured = check(case)
        except (KernelError, InterpreterError) as error:
            found.append(f"{kernel}: {case.name}: {error}")
            continue
        errors = "  ".join(f"{name} {m.kernel:.1e} ({m.bound:.1e})" for name, m in measured.items())
        print(f"{kernel}: {case.name}: {errors}", flush=True)
    return found


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatrain.kernels.verify")
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = commands.add_parser("interpreter", help="relative L2 errors to fp64, and what is done to memory")
    numbers.add_argument("--seed", type=int, default=0)
    compiles = commands.add_parser("aot", help="registers, stack, shared memory and instructions of compiled kernels")
    compiles.add_argument("--target", choices=TARGETS, help="all by default")
    compiles.add_argument("--update", action="store_true", help="take what is compiled now for the budgets")
    predicts = commands.add_parser("roofline", help="bytes and FLOPs against the least, and predicted times")
    predicts.add_argument("--target", choices=roofline.GPUS, help="all by default")
    on_gpu = commands.add_parser("device", help="on this machine's GPU: random shapes, times, and the stamp")
    on_gpu.add_argument("--shapes", type=int, default=2000, help="of each kernel")
    on_gpu.add_argument("--seed", type=int, default=0)
    on_gpu.add_argument("--no-stamp", action="store_true", help="write no stamp")
    for command in (numbers, compiles, predicts, on_gpu):
        command.add_argument("--kernel", choices=KERNELS, help="all by default")
    options = parser.parse_args()
    kernels = [options.kernel] if options.kernel else KERNELS
    if options.command == "device":
        return device.run(kernels, options.shapes, options.seed, stamp=not options.no_stamp)
    if options.command == "interpreter":
        found = [line for kernel in kernels for line in interpreter(kernel, options.seed)]
    elif options.command == "roofline":
        for target in [options.target] if options.target else roofline.GPUS:
            roofline.run(kernels, target)
        found = []
    else:
        print(aot.HEADER)
        found = aot.run(kernels, [options.target] if options.target else TARGETS, options.update)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
