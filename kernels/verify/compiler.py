"""Compiles kernels for GPUs that this machine needn't have, and reads what the compiler made. Run by aot.py.

    python -m megatrain.kernels.verify.compiler sm_90 < COMPILATIONS.json > RESOURCES.jsonl

Design choices:
- A process of its own: triton has to be imported to compile here (without TRITON_INTERPRET), and its cache is a folder
  that the process which started it throws away, so that no old compilation stands in for one.
- Resources come from the machine code (cuobjdump and nvdisasm, in triton's wheel): triton itself knows them only with a
  driver.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatrain.kernels.verify.case import Compilation

TOOLS = Path(nvidia.__path__[0]) / "bin"
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+):")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    registers: of a thread. stack: bytes of a thread; what spills is there. shared: bytes of a block. instructions: how
    often each stands in the code (not how often it runs), by SASS name ("LDG.E.128.CONSTANT"). loop: how many stand in
    the shortest loop (of those with matrix products if there are such), None without one.
    """

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    loop: int | None


def compiled(compilation: Compilation, target: str) -> Resources:
    """Compiles for "sm_90" or the like."""
    module, _, name = compilation.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    types: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for place, arg in enumerate(function.arg_names):
        of_arg = "constexpr" if arg in compilation.constants else compilation.types[arg]
        types[arg] = of_arg if isinstance(of_arg, str) else tuple(of_arg)
        parts = {(place,): of_arg} if isinstance(of_arg, str) else {(place, i): t for i, t in enumerate(of_arg)}
        for path, part in parts.items():
            if part.startswith("*") or arg in compilation.divisible:
                aligned[path] = [["tt.divisibility", 16]]
    made: Any = triton.compile(
        ASTSource(function, types, constexprs=dict(compilation.constants), attrs=aligned),
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={
            "num_warps": compilation.num_warps,
            "num_stages": compilation.num_stages,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = RESOURCES.search(_tool("cuobjdump", "--dump-resource-usage", file.name))
        listing = _tool("nvdisasm", "-c", file.name)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of {compilation.name}'s resources")
    counts = dict(Counter(OPCODE.findall(listing)))
    return Resources(int(usage[1]), int(usage[2]), made.metadata.shared, counts, shortest_loop(listing))


def shortest_loop(listing: str) -> int | None:
    """The instructions of the shortest loop, of those with matrix products if there are such.

    From a label to the last jump back to it. What jumps to itself fills up the code's end, and is none.
    """
    labels: dict[str, int] = {}
    products: list[bool] = []
    loops: dict[str, tuple[bool, int]] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(products)
        elif opcode := OPCODE.match(line):
            products.append("MMA" in opcode[1])
            jump = JUMP.search(line)
            if jump and jump[1] in labels and labels[jump[1]] < len(products) - 1:
                inside = products[labels[jump[1]] :]
                loops[jump[1]] = not any(inside), len(inside)
    return min(loops.values())[1] if loops else None


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Writes a line of JSON as soon as each is compiled."""
    for fields in json.load(sys.stdin):
        compilation = Compilation(**fields)
        print(json.dumps({"name": compilation.name, **asdict(compiled(compilation, sys.argv[1]))}), flush=True)


if __name__ == "__main__":
    main()
