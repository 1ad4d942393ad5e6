"""What kernels have to do, what they do, and so how long they take at least, at the shapes of Llama 7B. A prediction.

The roofline of Williams, Waterman and Patterson 2009, with two more ceilings: a kernel takes at least as long as the
memory takes for its bytes, the matrix units for its products, the special function units for its exponentials, the
schedulers for its instructions. The highest of these is its bound. What no ceiling knows (latency, waves that don't
fill the GPU, clocks that fall under load, the launch) comes on top.

Design choices:
- Bytes, products and exponentials are counted by each kernel's verify.py from its loops and grid; tests compare that
  with what the interpreter sees at small shapes, and they have to be equal.
- What is read again is left to caches and takes no time here; but the rate they need for it is shown.
- Instructions and occupancy come from the compiled kernels, as budgets.json has them. Of instructions outside the
  shortest loop it is known how many there are, not how often each is issued: the most is taken.
- Peaks are those of data sheets, without sparsity. Sources: "NVIDIA A100 Tensor Core GPU" (80GB SXM), "NVIDIA H100
  Tensor Core GPU" (SXM), "NVIDIA DGX B200" (an eighth), "AMD Instinct MI300X". Clocks are those at which these peaks
  hold: A100 and H100 architecture papers; for B200 the peak over 148 multiprocessors of 8192 FLOPs a cycle. Limits of a
  multiprocessor and its 16 exponentials a cycle: "CUDA C++ Programming Guide", compute capabilities and arithmetic
  throughput; of AMD's, whose exponentials and issue have no ceiling here: "CDNA 3 ISA".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from megatrain.kernels.attention.verify import DOCUMENTS, packed_documents
from megatrain.kernels.verify.aot import budgets
from megatrain.kernels.verify.case import LLAMA_7B, Launch, Pass, Work, verifiable

SHAPES = (LLAMA_7B, replace(LLAMA_7B, batch=4))

SCHEDULERS = 4
"""Of a multiprocessor."""

REGISTERS = 512
"""That a scheduler has for each thread of a warp; a warp takes 8 at a time."""

PROGRAMS = 32
"""Of a multiprocessor at most."""


@dataclass(frozen=True)
class Gpu:
    """clock: Hz. products: FLOP/s of dense bf16. bandwidth: bytes/s of its memory.

    Of a multiprocessor: warps that it holds, bytes of shared memory (`reserved` of them the system's, a program); and
    how many exponentials it computes, and instructions of warps it issues, a cycle; 0 where that isn't known.
    """

    name: str
    processors: int
    clock: float
    products: float
    bandwidth: float
    warps: int = 64
    shared: int = 228 * 1024
    reserved: int = 1024
    exponentials: int = 16
    issues: int = SCHEDULERS


GPUS = {
    "sm_80": Gpu("A100 80GB SXM", 108, 1.41e9, 312e12, 2.039e12, shared=164 * 1024),
    "sm_90": Gpu("H100 SXM", 132, 1.83e9, 989e12, 3.35e12),
    "sm_100": Gpu("B200", 148, 1.86e9, 2250e12, 8.0e12),
    "gfx942": Gpu(
        "MI300X", 304, 2.1e9, 1307e12, 5.3e12, warps=32, shared=64 * 1024, reserved=0, exponentials=0, issues=0
    ),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: its budget, and warps a program. loop: see compiler.Resources, 0 without one."""

    registers: int
    shared: int
    instructions: int
    warps: int
    loop: int = 0

    def resident(self, gpu: Gpu) -> int:
        """Programs that a multiprocessor holds at once."""
        rounded = -(-self.registers // 8) * 8
        by_registers = REGISTERS // rounded * SCHEDULERS // self.warps
        by_shared = gpu.shared // max(1, self.shared + gpu.reserved)
        return min(by_registers, by_shared, gpu.warps // self.warps, PROGRAMS)

    def issued(self, launch: Launch) -> int:
        """Instructions of warps, at most."""
        return self.warps * (launch.once * (self.instructions - self.loop) + launch.turns * self.loop)


@dataclass(frozen=True)
class Prediction:
    """Seconds that a launch takes at least for each of its ceilings. occupancy: of the warps a multiprocessor holds."""

    memory: float
    products: float = 0.0
    exponentials: float = 0.0
    issue: float = 0.0
    occupancy: float | None = None

    @property
    def ceilings(self) -> dict[str, float]:
        """By name."""
        return {
            "memory": self.memory,
            "products": self.products,
            "exponentials": self.exponentials,
            "issue": self.issue,
        }

    @property
    def seconds(self) -> float:
        """The prediction."""
        return max(self.ceilings.values())

    @property
    def bound(self) -> str:
        """Which ceiling that is."""
        return max(self.ceilings, key=self.ceilings.__getitem__)


def predict(launch: Launch, resources: Resources | None, gpu: Gpu) -> Prediction:
    """Without resources by bytes alone."""
    memory = launch.work.moved / gpu.bandwidth
    if resources is None:
        return Prediction(memory)
    cycles = gpu.processors * gpu.clock
    resident = min(resources.resident(gpu), -(-launch.programs // gpu.processors))
    return Prediction(
        memory,
        launch.work.products / gpu.products,
        launch.work.exponentials / (gpu.exponentials * cycles) if gpu.exponentials else 0.0,
        resources.issued(launch) / (gpu.issues * cycles) if gpu.issues else 0.0,
        occupancy=resident * resources.warps / gpu.warps,
    )


def resources(kernel: str, target: str) -> dict[str, Resources]:
    """Of a kernel's compilations, by name; of those that have a budget."""
    known = budgets(kernel)
    return {
        compilation.name: Resources(**known[compilation.name][target], warps=compilation.num_warps)
        for compilation in verifiable(kernel).compilations(target)
        if target in known.get(compilation.name, {})
    }


COLUMNS = (
    f"{'':<44} {'MB':>7} {'/least':>6} {'again':>7} {'GFLOP':>7} {'/least':>6} {'warps':>5} "
    f"{'memory':>7} {'products':>8} {'exp':>7} {'issue':>7} {'caches':>7}  {'at least':>8}"
)
"""MB: read and written. again: MB read once more. warps: occupancy. memory to issue, at least: microseconds. caches:
TB/s that they have to give for that."""


def _counted(name: str, work: Work, least: Work | None) -> str:
    """The first columns."""
    of_bytes = f"{work.moved / least.moved:.3f}" if least else ""
    of_products = f"{work.products / least.products:.3f}" if least and least.products else ""
    products = f"{work.products / 1e9:.0f}" if work.products else ""
    return f"{name:<44} {work.moved / 1e6:>7.1f} {of_bytes:>6} {work.again / 1e6:>7.1f} {products:>7} {of_products:>6}"


def _predicted(work: Work, prediction: Prediction) -> str:
    """The other columns."""
    occupancy = "" if prediction.occupancy is None else f"{prediction.occupancy:.0%}"
    times = (f"{seconds * 1e6:.1f}" if seconds else "" for seconds in prediction.ceilings.values())
    memory, products, exponentials, issue = times
    caches = (work.moved + work.again) / prediction.seconds / 1e12
    return (
        f"{occupancy:>5} {memory:>7} {products:>8} {exponentials:>7} {issue:>7} {caches:>7.1f}  "
        f"{prediction.seconds * 1e6:>8.1f}  {prediction.bound}"
    )


def rows(done: Pass, made: dict[str, Resources], gpu: Gpu) -> Iterator[str]:
    """Lines of the table: one for an operation, and where it has several launches one for each of them."""
    predicted = [
        predict(launch, made[launch.compilation] if launch.compilation else None, gpu) for launch in done.launches
    ]
    first = _counted(done.name, done.work, done.least)
    if len(predicted) == 1:
        yield f"{first} {_predicted(done.work, predicted[0])}"
        return
    yield f"{first} {'':>45}  {sum(p.seconds for p in predicted) * 1e6:>8.1f}"
    for launch, prediction in zip(done.launches, predicted, strict=True):
        yield f"{_counted('  ' + launch.name, launch.work, None)} {_predicted(launch.work, prediction)}"


def run(kernels: Iterable[str], target: str) -> None:
    """Prints the table of a target. Raises KeyError where a kernel that it needs has no budget."""
    gpu = GPUS[target]
    print(
        f"{gpu.name} ({target}): {gpu.processors} multiprocessors at {gpu.clock / 1e9:.2f} GHz, "
        f"{gpu.products / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s. A prediction: nothing here was timed."
    )
    for shape in SHAPES:
        print(f"\nLlama 7B, {shape.batch} x {shape.length} tokens")
        print(COLUMNS)
        for kernel in kernels:
            made = resources(kernel, target)
            for done in verifiable(kernel).passes(shape, target, gpu.processors):
                for row in rows(done, made, gpu):
                    print(row)
    if "attention" in kernels:
        print("\nPacked documents, scores computed / needed, where documents begin with a block (and at worst)")
        print(f"{'length in blocks':<18}" + "".join(f"{length:>14}" for length in DOCUMENTS))
        for name, excesses in packed_documents(target, LLAMA_7B.head_dim):
            print(f"{name:<18}" + "".join(f"{f'{begin:.2f} ({worst:.2f})':>14}" for begin, worst in excesses))
    print()
