"""The house (docs/design.md): who may import whom, who knows the device, what needs no torch, how long things are."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from megatrain.compose import CONF, RECIPES, SCHEMAS, compose
from megatrain.config import TrainConfig
from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.config import check as check_prep
from megatrain.data_prep.steps import steps
from megatrain.model import spec

ROOT = Path(__file__).parents[1]

LAYERS = (
    "__main__",
    "launcher",
    "train",
    "trainer checks",
    "layout",
    "evaluate inspect doctor",
    "checkpoint",
    "engines observe",
    "objectives data optimizer",
    "model",
    "parallel data_prep",
    "resilience kernels batch compose model.spec schedule data.format command_config",
    "config",
    "device storage data_config resilience_config",
    "errors",
)
"""The parts of megatrain, the highest first. A part imports from lower lines only: never upwards, never from its own
line. `model.spec` and `data.format` are files that lie lower than the folder they are in."""

ONLY = {
    "kernels": {"device"},
    "data_prep": {"errors", "data.format", "storage"},
    "model.spec": {"config", "errors"},
    "data.format": {"errors", "storage"},
}
"""Parts that may import less than what lies below them."""

WITHOUT_TORCH = (
    "__main__ launcher checks layout compose config data_config resilience_config command_config errors",
    "doctor.command doctor.diagnosis doctor.finding doctor.gpu doctor.node",
    "model.spec model.partition",
    "objectives observe.records observe.report schedule storage parallel.schedules",
    "checkpoint.format checkpoint.folders checkpoint.index checkpoint.remote checkpoint.retention",
    "checkpoint.huggingface.config checkpoint.huggingface.keys",
    "data.cache data.format data.mixture data.order data.prefetch data.reader data.remote data.remote_folder",
    "data.samples data.sequences data.slots data.state data_prep.* resilience.* kernels.stamps",
)
"""What answers before torch is there: the command line and its checks, the offline stage, the parts of
a run that only read and write files."""

DEVICE = re.compile(r"torch\.cuda|from torch import .*\bcuda\b|\.cuda\(|torch\.device\([\"']cuda")
"""What megatrain/device.py alone may say."""

MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 60


def product_files() -> list[Path]:
    """Every file of the package, once: what the links lead to is taken where it lies."""
    folders = (ROOT / name for name in ("megatrain", "kernels", "data_prep"))
    return sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})


def all_files() -> list[Path]:
    others = (ROOT / name for name in ("tests", "examples", "benchmarks", "launch", "docs"))
    return [*product_files(), *sorted(path for folder in others for path in folder.rglob("*.py"))]


def module_name(path: Path) -> str:
    """The dotted name below `megatrain`; of a package's __init__.py the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    below = parts[1:] if parts[0] == "megatrain" else parts
    return ".".join(below[:-1] if below[-1] == "__init__" else below)


def imports(source: str, modules: Collection[str]) -> Iterator[str]:
    """The modules of the project that a source imports.

    Those inside functions and under TYPE_CHECKING count too: who changes what is imported has to look at the importer,
    whenever the line runs. Names in strings (the tables of commands and of schemas) don't: they are looked up at the
    user's word. A relative import gives its dots, which no layer has.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, below = name.partition(".")
            if top in ("", "kernels", "data_prep", "tests"):
                yield name
            elif top == "megatrain":
                yield below if below in modules else below.rpartition(".")[0]


def part(module: str) -> str:
    """The part of LAYERS that a module belongs to: the longest that is a beginning of its name."""
    parts = " ".join(LAYERS).split()
    found = [p for p in parts if module == p or module.startswith(f"{p}.")]
    assert found, f"{module} has no place in LAYERS"
    return max(found, key=len)


def level(name: str) -> int:
    return next(i for i, line in enumerate(LAYERS) if name in line.split())


def forbidden(module: str, imported: Iterable[str]) -> list[str]:
    """The imports of a module that don't run downwards."""
    own = part(module)
    found = []
    for other in imported:
        its = part(other)
        allowed = its in ONLY[own] if own in ONLY else level(its) > level(own)
        if its != own and not allowed:
            found.append(f"{module} imports {other}")
    return found


@cache
def graph() -> dict[str, set[str]]:
    """What each module of the package imports of it."""
    sources = {module_name(path): path.read_text() for path in product_files()}
    return {module: set(imports(source, sources)) - {""} for module, source in sources.items()}


def test_imports_run_downwards() -> None:
    assert [line for module, imported in graph().items() if module for line in forbidden(module, imported)] == []


def test_no_imports_in_a_circle() -> None:
    list(TopologicalSorter(graph()).static_order())


def test_every_part_of_the_list_exists() -> None:
    modules = graph()
    assert [name for name in " ".join(LAYERS).split() if name not in modules] == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("batch", "from megatrain import device", []),
        ("data.loader", "from megatrain.objectives import build", ["data.loader imports objectives"]),
        ("objectives.causal", "import megatrain.data.order", ["objectives.causal imports data.order"]),
        ("config", "def f():\n    from megatrain.batch import Batch", ["config imports batch"]),
        ("model", "if TYPE_CHECKING:\n    from megatrain.trainer import Trainer", ["model imports trainer"]),
        ("kernels.attention.op", "from megatrain.batch import Batch", ["kernels.attention.op imports batch"]),
        ("kernels.attention.op", "from megatrain.device import CPU", []),
        ("data_prep.shards.cut", "from megatrain.data.order import Int64", ["data_prep.shards.cut imports data.order"]),
        ("data_prep.shards.cut", "from megatrain.data.format import Manifest", []),
        ("model.spec", "import megatrain.parallel", ["model.spec imports parallel"]),
        ("engines.deepspeed", "from megatrain.engines import ranges", []),
    ],
)
def test_the_import_rule_can_fail(module: str, source: str, found: list[str]) -> None:
    assert forbidden(module, imports(source, graph())) == found


def test_only_the_device_module_knows_the_device() -> None:
    files = [path for path in all_files() if ROOT / "tests" not in path.parents]
    knowing = [str(path.relative_to(ROOT)) for path in files if DEVICE.search(path.read_text())]
    assert [path for path in knowing if path != "megatrain/device.py"] == []


@pytest.mark.parametrize(
    "line", ["torch.cuda.synchronize()", "x = y.cuda()", 'torch.device("cuda:0")', "from torch import Tensor, cuda"]
)
def test_the_device_rule_can_fail(line: str) -> None:
    assert DEVICE.search(line)


BLOCKED = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(module, error)
"""
"""A program that names the modules which can't be imported without torch."""


def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_what_needs_no_torch_imports_none() -> None:
    modules = [module for name in " ".join(WITHOUT_TORCH).split() for module in fnmatch.filter(graph(), name)]
    assert len(modules) > 30
    ended = python("-c", BLOCKED, "megatrain", *(f"megatrain.{module}" for module in modules))
    assert (ended.stdout, ended.stderr) == ("", "")


def test_the_blocked_import_can_fail() -> None:
    assert python("-c", BLOCKED, "megatrain.batch").stdout == "megatrain.batch torch is blocked\n"


def test_data_prep_is_no_package_of_its_own() -> None:
    ended = python("-c", "import data_prep")
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: import megatrain.data_prep, not data_prep: the package is `megatrain`"
    )


@pytest.mark.parametrize("line", ["from kernels import attention", "import kernels; kernels.get_kernel"])
def test_kernels_is_no_package_of_its_own(line: str) -> None:
    """Found all the same, for transformers probes for a package of that name; what is asked of it isn't there."""
    ended = python("-c", line)
    assert re.fullmatch(
        r"ImportError: kernels\.\w+: this is megatrain's folder, import it as megatrain\.kernels; .*",
        ended.stderr.splitlines()[-1],
    )


@pytest.mark.parametrize("as_file", [False, True], ids=["missing", "as a text file"])
def test_a_broken_link_is_one_clear_line(as_file: bool, tmp_path: Path) -> None:
    """Git without symbolic links checks them out as text files."""
    package = tmp_path / "megatrain"
    package.mkdir()
    shutil.copy(ROOT / "megatrain" / "__init__.py", package)
    if as_file:
        (package / "kernels").write_text("../kernels")
    ended = python("-c", "import megatrain", folder=tmp_path)
    assert ended.stderr.splitlines()[-1].startswith("ImportError: megatrain/kernels should be a link to ../kernels: ")


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in all_files()}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE} == {}


def test_every_function_fits_a_screen() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for path in all_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


EVERY_CHOICE = sorted(path.relative_to(CONF).with_suffix("").parts for path in CONF.glob("*/*.yaml"))
RECIPE_CHOICES = [choice for choice in EVERY_CHOICE if choice[0] in RECIPES["prep"]]
CHOICES = [choice for choice in EVERY_CHOICE if choice not in RECIPE_CHOICES]
"""(group, choice) of each file in a group's folder."""


def test_every_file_of_conf_is_a_command_or_a_choice() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {*SCHEMAS, "base"}
    assert {group for group, _ in CHOICES} <= set(get_type_hints(TrainConfig))


@pytest.mark.parametrize(("group", "choice"), RECIPE_CHOICES)
def test_every_recipe_composes(group: str, choice: str) -> None:
    config = compose("prep", ["input=i", "output=o", "tokenizer.train=true", f"{group}={choice}"])
    assert isinstance(config, PrepConfig)
    check_prep(config)
    assert steps(config, None) or choice == "plain"


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group: str, choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run_dir=r", "max_steps=1", f"{group}={choice}"]
    config = compose("train", arguments)
    assert isinstance(config, TrainConfig)
    spec.check(config.model)
    assert compose("train", [*arguments, "--cfg", "job"]) is None
    assert f"\n{group}:\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_command_composes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compose(command, ["--cfg", "job"]) is None
    assert OmegaConf.create(capsys.readouterr().out)
