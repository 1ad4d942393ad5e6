"""Kernels compiled ahead of time, for GPUs that needn't be there, against the budget of each.

Design choices:
- A budget is what the pinned triton made when the kernel was last looked at: budgets.json in its folder, by compilation
  and target. More registers, shared memory or instructions than that is a regression. Another triton has no budgets.
- Whatever the budget says, nothing may spill: a stack or a load or store of local memory is an error.
- One process a target compiles all its kernels, in a cache that starts empty.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from megatrain.kernels.verify.case import Compilation, verifiable

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Targets, and the bytes of shared memory that a block may have (CUDA programming guide, compute capabilities)."""

SHOWN = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "LDG", "STG", "LDL", "STL")
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
        return sum(n for name, n in self.instructions.items() if f"{name}.".startswith(f"{instruction}."))

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


def budgets_file(kernel: str) -> Path:
    """Where a kernel's budgets are."""
    return Path(__file__).parents[1] / kernel / "budgets.json"


def complaints(made: Compiled, compilation: Compilation, budget: dict[str, int] | None) -> list[str]:
    """What is wrong with a compiled kernel, a line each."""
    found = []
    local = made.count("LDL") + made.count("STL")
    if made.stack or local:
        found.append(f"it spills: a stack of {made.stack} bytes, {local} loads and stores of local memory")
    if made.shared > SHARED_MEMORY[made.target]:
        found.append(f"{made.shared} bytes of shared memory, {made.target} has {SHARED_MEMORY[made.target]}")
    found += [f"no {name} instruction" for name in compilation.instructions if not made.count(name)]
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


def run(kernel: str, targets: Iterable[str], update: bool = False) -> list[str]:
    """Compiles a kernel for targets and prints the table; what is wrong, a line each. update: writes the budgets."""
    file = budgets_file(kernel)
    triton = version("triton")
    budgets = json.loads(file.read_text()) if file.exists() else {}
    known = budgets.get("budgets", {}) if budgets.get("triton") == triton else {}
    found = []
    for target in targets:
        compilations = {compilation.name: compilation for compilation in verifiable(kernel).compilations(target)}
        for made in compile_all(compilations.values(), target):
            print(made.row(), flush=True)
            if update:
                known.setdefault(made.name, {})[target] = made.budget()
            found += complaints(made, compilations[made.name], known.get(made.name, {}).get(target))
    if update:
        file.write_text(json.dumps({"triton": triton, "budgets": known}, indent=1) + "\n")
    return found
