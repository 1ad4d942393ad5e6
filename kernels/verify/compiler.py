"""Compiles kernels for GPUs that this machine needn't have, and reads what the compiler made. Run by aot.py.

    python -m megatrain.kernels.verify.compiler sm_90 < COMPILATIONS.json > RESOURCES.jsonl

Design choices:
- A process of its own: triton has to be imported to compile here (without TRITON_INTERPRET), and its cache is a folder
  that the process which started it throws away, so that no old compilation stands in for one.
- Resources come from the machine code (NVIDIA's by cuobjdump and nvdisasm, in triton's wheel; AMD's as triton has its
  text): triton itself knows them only with a driver.
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
from megatrain.kernels.verify.targets import TARGETS, Target

TOOLS = Path(nvidia.__path__[0]) / "bin"
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+):")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
AMD_OPCODE = re.compile(r"^\t([a-z]\w*)", re.MULTILINE)
AMD_RESOURCES = re.compile(r"\.(private_segment_fixed_size|vgpr_count): +(\d+)")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    registers: of a thread; on AMD of both kinds of vector registers. stack: bytes of a thread; what spills is there.
    shared: bytes of a block. instructions: how often each stands in the code (not how often it runs), by its name in
    machine code ("LDG.E.128.CONSTANT", "v_mfma_f32_32x32x8_bf16"). loop: how many stand in the shortest loop (of
    those with matrix products if there are such), None without one and on AMD, whose instructions take no such equal
    times.
    """

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    loop: int | None


def compiled(compilation: Compilation, target: Target) -> Resources:
    """Compiles a kernel and looks at what was made."""
    module, _, name = compilation.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    types: dict[str, Any] = {}
    known: dict[tuple[int, ...], list[list[str | int]]] = {}
    for place, arg in enumerate(function.arg_names):
        of_arg = "constexpr" if arg in compilation.constants else compilation.types[arg]
        types[arg] = of_arg if isinstance(of_arg, str) else tuple(of_arg)
        parts = {(place,): of_arg} if isinstance(of_arg, str) else {(place, i): t for i, t in enumerate(of_arg)}
        for path, part in parts.items():
            pointer = part.startswith("*")
            if pointer or arg in compilation.divisible:
                known[path] = [["tt.divisibility", 16]]
            if pointer and target.backend == "hip" and not compilation.wide_addresses:
                known[path].append(["tt.pointer_range", 32])
    made: Any = triton.compile(
        ASTSource(function, types, constexprs=dict(compilation.constants), attrs=known),
        target=GPUTarget(target.backend, target.architecture, target.lanes),
        options={
            "num_warps": compilation.num_warps,
            "num_stages": compilation.num_stages,
            "enable_fp_fusion": True,
        },
    )
    return _of_amd(made) if target.backend == "hip" else _of_nvidia(made)


def _of_nvidia(made: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = RESOURCES.search(_tool("cuobjdump", "--dump-resource-usage", file.name))
        listing = _tool("nvdisasm", "-c", file.name)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of {made.metadata.name}'s resources")
    counts = dict(Counter(OPCODE.findall(listing)))
    return Resources(int(usage[1]), int(usage[2]), made.metadata.shared, counts, shortest_loop(listing))


def _of_amd(made: Any) -> Resources:
    listing: str = made.asm["amdgcn"]
    usage = {name: int(value) for name, value in AMD_RESOURCES.findall(listing)}
    counts = dict(Counter(AMD_OPCODE.findall(listing)))
    shared = made.metadata.shared
    return Resources(usage["vgpr_count"], usage["private_segment_fixed_size"], shared, counts, loop=None)


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
    target = TARGETS[sys.argv[1]]
    for fields in json.load(sys.stdin):
        compilation = Compilation(**fields)
        print(json.dumps({"name": compilation.name, **asdict(compiled(compilation, target))}), flush=True)


if __name__ == "__main__":
    main()
