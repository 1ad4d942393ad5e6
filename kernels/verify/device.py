"""Kernels on a GPU: thousands of random shapes against fp64, then time beside PyTorch and other libraries; the stamp.

Design choices:
- Each shape is run three times, the last beside another stream's work, which has its programs start in another order:
  all have to give the same bits. A race between programs, which the interpreter can't show, shows here.
- Numbers are held to the bounds of the interpreter's tests (measure.py), with bands around inputs and outputs.
- Shape i of a seed is the same on every machine, and with any number of shapes.
- Times decide nothing: a stamp says that a kernel is right, and how long it took.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from random import Random
from statistics import median

import torch

from megatrain import device
from megatrain.kernels import stamps
from megatrain.kernels.verify.case import LLAMA_7B, Case, Shape, verifiable
from megatrain.kernels.verify.measure import KernelError, banded_allocations, compare, run_banded
from megatrain.kernels.verify.peers import Race, race

SIZE = 2**20
"""About as many elements has the largest tensor of a random shape."""

LEAST_SHAPES = 1000
"""What a stamp takes."""

ROUNDS = 30
WARM_UP = 3

SHOWN = 5
"""So many wrong shapes of a kernel are told."""

SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9}

Steps = Mapping[str, Callable[[], object]]
Clock = Callable[[Steps], dict[str, list[float]]]
"""Runs each step some times, in turns; the seconds of each."""


@dataclass(frozen=True)
class Machine:
    """What runs kernels. busy: a context within which other work keeps it busy as well."""

    where: torch.device
    architecture: str
    name: str
    clock: Clock
    busy: Callable[[], AbstractContextManager[None]]


def this_gpu() -> Machine:
    """This process's GPU. Raises ValueError where there is none, or where Triton would interpret."""
    architecture = device.architecture()
    if architecture is None:
        raise ValueError("it needs a GPU that Triton compiles for, and there is none here")
    import triton

    if triton.knobs.runtime.interpret:
        raise ValueError("unset TRITON_INTERPRET: what is interpreted says nothing of a GPU")
    where = device.device()
    stream, ballast = torch.Stream(where), torch.zeros(2**26, device=where)

    @contextmanager
    def busy() -> Iterator[None]:
        with stream:
            for _ in range(20):  # As many milliseconds as a case takes to launch.
                ballast.add_(1)
        yield
        stream.synchronize()

    return Machine(where, architecture, device.name(), clock, busy)


def clock(steps: Steps) -> dict[str, list[float]]:
    """What a GPU takes for each, with cold caches.

    What empties the caches also gives the host the time to queue a step before it begins, so that launches don't count.
    """
    caches = torch.empty(2**29, dtype=torch.uint8, device=device.device())
    events: dict[str, list[tuple[torch.Event, torch.Event]]] = {name: [] for name in steps}
    for i in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            for _ in range(4):
                caches.zero_()
            began = device.event(timing=True)
            step()
            ended = device.event(timing=True)
            if i >= WARM_UP and began and ended:
                events[name].append((began, ended))
    for pairs in events.values():
        pairs[-1][1].synchronize()
    return {name: [began.elapsed_time(ended) / 1e3 for began, ended in pairs] for name, pairs in events.items()}


def check(case: Case, machine: Machine) -> float:
    """Runs a case three times; the share of its bound that the worst error has. Raises KernelError as compare does."""
    with banded_allocations():
        runs = [run_banded(case, machine.where), run_banded(case, machine.where)]
        with machine.busy():
            runs.append(run_banded(case, machine.where))
    return max(measured.kernel / measured.bound for measured in compare(case, runs, machine.where).values())


def check_shapes(kernel: str, machine: Machine, shapes: int, seed: int, size: int = SIZE) -> list[str]:
    """Checks random shapes of a kernel, and prints the worst; what is wrong, a line each."""
    found = []
    worst, where = 0.0, ""
    for i in range(shapes):
        case = verifiable(kernel).random_case(Random(f"{kernel} {seed} {i}"), size)
        try:
            share = check(case, machine)
        except KernelError as error:
            found.append(f"{kernel}: shape {i} of seed {seed}, {case.name}: {error}")
            continue
        except Exception as error:  # A launch that failed, after which the GPU is of no more use to this process.
            error.add_note(f"{kernel}: shape {i} of seed {seed}, {case.name}")
            raise
        if share >= worst:
            worst, where = share, case.name
    if found:
        more = [f"{kernel}: {len(found)} of {shapes} shapes are wrong"] if len(found) > SHOWN else []
        return [*found[:SHOWN], *more]
    print(f"{kernel}: {shapes} shapes are right; the worst has {worst:.2f} of its bound: {where}", flush=True)
    return []


def measure(kernel: str, race: Race, clock: Clock) -> dict[str, float]:
    """Times a race and prints the table; the milliseconds of forward and backward pass, by implementation."""
    medians = {}
    for title, work, steps in (
        ("forward", race.forward, {name: contender.forward for name, contender in race.contenders.items()}),
        ("both", race.both, {name: contender.both for name, contender in race.contenders.items()}),
    ):
        for name, seconds in clock(steps).items():
            ordered = sorted(seconds)
            tenth = len(ordered) // 10
            low, high = ordered[tenth] * 1e3, ordered[-1 - tenth] * 1e3
            medians[name] = median(ordered) * 1e3
            rate = work / (median(ordered) * SCALES[race.unit])
            spread = f"({low:.3f} to {high:.3f})"
            row = f"{f'{kernel}, {race.task}':<46} {title:<8} {name:<13} {medians[name]:8.3f} ms {spread:<20}"
            print(f"{row} {rate:8.1f} {race.unit}", flush=True)
    for name, why in race.absent.items():
        print(f"{kernel}: without {name}: {why}", flush=True)
    return medians


def verify(
    kernel: str, machine: Machine, shapes: int, seed: int, stamp: bool, size: int = SIZE, model: Shape = LLAMA_7B
) -> list[str]:
    """Checks and times a kernel, and writes its stamp if nothing was wrong; what is, a line each."""
    sources = stamps.source_hash(kernel)
    try:
        if found := check_shapes(kernel, machine, shapes, seed, size):
            return found
        milliseconds = measure(kernel, race(kernel, model, machine.where), machine.clock)
    except (KernelError, ValueError) as error:
        return [f"{kernel}: {error}"]
    if stamp:
        passed = stamps.Stamp(
            arch=machine.architecture,
            triton=version("triton"),
            sources=sources,
            gpu=machine.name,
            torch=torch.__version__,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            shapes=shapes,
            milliseconds={name: round(value, 4) for name, value in milliseconds.items()},
        )
        print(f"{kernel}: stamped in {stamps.write(kernel, passed)}", flush=True)
    return []


def run(kernels: Sequence[str], shapes: int, seed: int, stamp: bool) -> int:
    """Verifies kernels on this machine's GPU; the exit code: 2 where that can't be done here."""
    # Products of cuBLAS, which are a part of some operations, have the same bits beside another stream only so.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if stamp and shapes < LEAST_SHAPES:
            raise ValueError(f"--shapes {shapes}: a stamp takes at least {LEAST_SHAPES}; fewer go with --no-stamp")
        if stamp:
            for kernel in kernels:
                stamps.require_writable(kernel)
        machine = this_gpu()
    except (ValueError, PermissionError) as error:
        print(f"verify device: {error}", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    print(f"{machine.name}, {machine.architecture}, triton {version('triton')}, torch {torch.__version__}")
    print(f"times: Llama 7B, {LLAMA_7B.batch} x {LLAMA_7B.length} tokens, bf16; medians (10th to 90th percentile)")
    found = [line for kernel in kernels for line in verify(kernel, machine, shapes, seed, stamp)]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0
