"""Kernels compiled ahead of time, for GPUs that needn't be there, against the budget of each.

Design choices:
- A budget is what the pinned triton made when the kernel was last looked at: budgets.json in its folder, by compilation
  and target. More registers, shared memory or instructions than that is a regression. Another triton has no budgets.
- Whatever the budget says, nothing may spill: a stack or a load or store of local memory is an error.
- One process a target compiles all its kernels, in a cache that starts empty; the targets' run side by side.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from megatrain.kernels.verify.case import Compilation, verifiable
from megatrain.kernels.verify.targets import SPILL, TARGETS

SHOWN = (
    *("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL"),
    *("v_mfma", "global_load", "buffer_load", "global_store", "buffer_store", "scratch_load", "scratch_store"),
)
"""The instructions that the table counts: matrix products, loads through descriptors, asynchronous, global, local."""


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a target; see compiler.Resources for the fields."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    loop: int | None = None

    def count(self, instruction: str) -> int:
        """How often an instruction stands there, whatever follows its name ("LDG" and "LDG.E" count LDG.E.128)."""
        begin = re.compile(rf"{re.escape(instruction)}(?=[._]|$)")
        return sum(n for name, n in self.instructions.items() if begin.match(name))

    def does(self, kind: str) -> int:
        """How often instructions of a kind stand there, WIDE_LOAD or another of targets.py."""
        return sum(map(self.count, TARGETS[self.target].instructions[kind]))

    def budget(self) -> dict[str, int]:
        """What is written down of it."""
        total = sum(self.instructions.values())
        loop = {} if self.loop is None else {"loop": self.loop}
        return {"registers": self.registers, "shared": self.shared, "instructions": total} | loop

    def row(self) -> str:
        """A line of the table."""
        counts = " ".join(f"{name}={n}" for name in SHOWN if (n := self.count(name)))
        own = f"{self.registers:>4} {self.stack:>6} {self.shared / 1024:>6.1f} {sum(self.instructions.values()):>6}"
        return f"{self.name:<44} {self.target:<7} {own}  {counts}"


HEADER = f"{'kernel':<44} {'target':<7} regs  stack    KiB  instr"


def compile_all(compilations: Iterable[Compilation], target: str) -> Iterator[Compiled]:
    """Compiles for a target, in a process of its own; each as it is done.

    Raises RuntimeError where the compiler failed, with the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.compiler", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment | {"TRITON_CACHE_DIR": cache},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdin as stdin:
            json.dump([asdict(compilation) for compilation in compilations], stdin)
            stdin.close()
            for line in process.stdout:
                yield Compiled(target=target, **json.loads(line))
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"the compiler for {target} failed:\n{errors.read()[-4000:]}")


def compilations(kernel: str, target: str) -> Iterator[Compilation]:
    """What a kernel's verify.py says, for AMD in both forms: small tensors, and those of 2 GiB and more."""
    for compilation in verifiable(kernel).compilations(target):
        yield compilation
        if TARGETS[target].backend == "hip":
            yield replace(compilation, name=f"{compilation.name}, 2 GiB", wide_addresses=True)


def budgets_file(kernel: str) -> Path:
    """Where a kernel's budgets are."""
    return Path(__file__).parents[1] / kernel / "budgets.json"


def budgets(kernel: str) -> dict[str, dict[str, dict[str, int]]]:
    """A kernel's budgets by compilation and target; none where they are another triton's."""
    file = budgets_file(kernel)
    written = json.loads(file.read_text()) if file.exists() else {}
    known: dict[str, dict[str, dict[str, int]]] = (
        written["budgets"] if written.get("triton") == version("triton") else {}
    )
    return known


def complaints(made: Compiled, compilation: Compilation, budget: dict[str, int] | None) -> list[str]:
    """What is wrong with a compiled kernel, a line each."""
    found = []
    target = TARGETS[made.target]
    if made.stack or made.does(SPILL):
        found.append(f"it spills: a stack of {made.stack} bytes, {made.does(SPILL)} loads and stores of local memory")
    if made.shared > target.shared_memory:
        found.append(f"{made.shared} bytes of shared memory, {made.target} has {target.shared_memory}")
    missing = (kind for kind in compilation.instructions if not made.does(kind))
    found += [f"no {kind} ({', '.join(target.instructions[kind])})" for kind in missing]
    if compilation.loop_cycles is not None:
        # Four schedulers issue one instruction of a warp a cycle each.
        issued = (made.loop or 0) * compilation.num_warps // 4
        if not 0 < issued <= compilation.loop_cycles:
            found.append(f"its loop takes {issued} cycles to issue, its matrix products {compilation.loop_cycles}")
    if budget is None:
        found.append("no budget: run with --update and look at what changes")
    else:
        over = ((name, value, budget[name]) for name, value in made.budget().items() if value > budget[name])
        found += [f"{value} {name}, the budget is {most}" for name, value, most in over]
    return [f"{made.name}, {made.target}: {line}" for line in found]


def run(kernels: Sequence[str], targets: Iterable[str], update: bool = False) -> list[str]:
    """Compiles kernels for targets and prints the table; what is wrong, a line each. update: writes the budgets."""
    known = {kernel: budgets(kernel) for kernel in kernels}
    found = []
    with ThreadPoolExecutor(len(TARGETS)) as pool:
        for results in pool.map(partial(_of_target, kernels), targets):
            for kernel, compilation, made in results:
                budget = known[kernel].setdefault(made.name, {})
                if update:
                    budget[made.target] = made.budget()
                found += complaints(made, compilation, budget.get(made.target))
    if update:
        for kernel, of_kernel in known.items():
            text = json.dumps({"triton": version("triton"), "budgets": of_kernel}, indent=1)
            budgets_file(kernel).write_text(f"{text}\n")
    return found


def _of_target(kernels: Sequence[str], target: str) -> list[tuple[str, Compilation, Compiled]]:
    """Prints a row as soon as each is compiled."""
    work = [(kernel, each) for kernel in kernels for each in compilations(kernel, target)]
    results = []
    for (kernel, compilation), made in zip(work, compile_all([each for _, each in work], target), strict=True):
        print(made.row(), flush=True)
        results.append((kernel, compilation, made))
    return results
