"""The images' files as far as they can be checked without Docker; test_chroot.py does the steps of one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.docker.dockerfile import ROOT, Instruction, parse

BIN = Path(sys.executable).parent
DOCKER = ROOT / "docker"
FILES = ["Dockerfile", "Dockerfile.cpu"]
DEFINITION = (DOCKER / "megatrain.def").read_text()
PIP = re.compile(r"pip install [^&;\n]*")


def texts(file: str, name: str) -> list[str]:
    """What follows each instruction of that name."""
    return [each.text for each in parse(DOCKER / file) if each.name == name]


def the(file: str, name: str) -> Instruction:
    """The only instruction of that name."""
    (found,) = [each for each in parse(DOCKER / file) if each.name == name]
    return found


@pytest.mark.parametrize("file", FILES)
def test_hadolint_has_nothing_to_say(file: str) -> None:
    subprocess.run([BIN / "hadolint", DOCKER / file], check=True)


@pytest.mark.parametrize("file", FILES)
def test_what_a_step_runs_is_shell(file: str) -> None:
    for step in texts(file, "RUN"):
        subprocess.run(["sh", "-n", "-c", step], check=True)


@pytest.mark.parametrize("file", FILES)
def test_what_is_copied_is_there_and_not_ignored(file: str) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for text in texts(file, "COPY"):
        source, _target = text.split()
        assert (ROOT / source).exists()
        assert not [pattern for pattern in ignored if fnmatch(source, pattern)]
    needed = ["megatrain", "kernels", "data_prep", "conf", "pyproject.toml", "constraints.txt", "README.md"]
    assert not [name for name in needed for pattern in ignored if fnmatch(name, pattern)]


@pytest.mark.parametrize("file", FILES)
def test_every_version_is_pinned_by_constraints(file: str) -> None:
    base = the(file, "FROM").text
    assert re.fullmatch(r"[\w/]+:\d+\.\d+[\w.-]+", base), "a base with its version"
    steps = [step for text in texts(file, "RUN") for step in PIP.findall(text)]
    assert len(steps) >= 2
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    unpinned = {"setuptools", "wheel"}  # They build; no version of theirs is in what is built.
    for step in steps:
        assert re.search(r" --no-cache-dir -c (/tmp/)?constraints\.txt ", step), step
        packages = [word for word in step.split()[2:] if re.fullmatch(r"[a-z][a-z-]*", word)]
        assert {*packages} - pins - unpinned == set(), step


@pytest.mark.parametrize("file", FILES)
def test_an_image_runs_megatrain_as_a_user_and_can_be_asked_for_its_health(file: str) -> None:
    instructions = parse(DOCKER / file)
    user = the(file, "USER")
    assert int(user.text) > 0
    assert f"useradd --create-home --uid {user.text} megatrain" in "".join(texts(file, "RUN"))
    assert not [each for each in instructions if each.name in ("RUN", "COPY") and each.line > user.line]
    assert the(file, "ENTRYPOINT").words() == ["megatrain"]
    assert the(file, "CMD").words() == ["--help"]
    expected = {"Dockerfile": "nvidia-smi", "Dockerfile.cpu": "megatrain"}
    assert the(file, "HEALTHCHECK").words()[0] == expected[file]
    assert "PYTHONSAFEPATH=1" in " ".join(texts(file, "ENV"))


def test_the_operations_that_are_built_are_deepspeeds_for_cuda() -> None:
    """It ignores a name that it hasn't."""
    found = importlib.util.find_spec("deepspeed")
    assert found is not None
    assert found.origin is not None
    builders = Path(found.origin).parent / "ops" / "op_builder"
    there = {name for file in builders.glob("*.py") for name in re.findall(r'BUILD_VAR = "(\w+)"', file.read_text())}
    (asked,) = re.findall(r'^DEEPSPEED_OPS="(.+)"$', "\n".join(texts("Dockerfile", "ARG")), re.MULTILINE)
    assert {word.removesuffix("=1") for word in asked.split()} <= there


def test_the_definition_for_apptainer_has_the_steps_of_the_dockerfile() -> None:
    assert f"\nBootstrap: docker\nFrom: {the('Dockerfile', 'FROM').text}\n" in DEFINITION

    def steps(text: str) -> list[list[str]]:
        """Of each pip install, what doesn't depend on where constraints.txt lies and on how the index is given."""
        varying = re.compile(r'(/tmp/)?constraints\.txt|\$\{TORCH_INDEX.*?\}(?= )|--index-url "\{\{ TORCH_INDEX \}\}"')
        return [varying.sub("", step).split() for step in PIP.findall(text) if ".[gpu]" not in step]

    dockerfile = "\n".join(texts("Dockerfile", "RUN"))
    assert steps(DEFINITION) == steps(dockerfile)
    packages = re.findall("apt-get install (.*?) *(?:&&|\n)", f"{dockerfile}\n{DEFINITION}")
    assert len(packages) == 2
    assert packages[0] == packages[1]
    arguments = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(texts("Dockerfile", "ARG")), re.MULTILINE))
    assert f'TORCH_CUDA_ARCH_LIST="{arguments["TORCH_CUDA_ARCH_LIST"]}" {arguments["DEEPSPEED_OPS"]}\n' in DEFINITION
    files = re.findall(r"^    (\S+) /opt/megatrain/(\S+)$", DEFINITION, re.MULTILINE)
    assert all(source == target and (ROOT / source).exists() for source, target in files)
    sections = re.findall(r"^%(\w+)$", DEFINITION, re.MULTILINE)
    assert sections == ["arguments", "files", "post", "environment", "runscript", "test"]
    for name in ("post", "environment", "runscript", "test"):
        body = re.split(r"^%\w+$", DEFINITION.partition(f"\n%{name}\n")[2], flags=re.MULTILINE)[0]
        subprocess.run(["sh", "-n", "-c", body], check=True)


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("gpu", "docker build -f docker/Dockerfile -t megatrain:latest --build-arg TORCH_INDEX={}/cu130 --pull ."),
        ("cpu", "docker build -f docker/Dockerfile.cpu -t megatrain:cpu --build-arg TORCH_INDEX={}/cpu --pull ."),
        ("sif", "apptainer build --build-arg TORCH_INDEX={}/cu130 --pull megatrain.sif docker/megatrain.def"),
    ],
)
def test_what_is_built(tmp_path: Path, kind: str, command: str) -> None:
    for program in ("docker", "apptainer"):
        (tmp_path / program).write_text(f'#!/bin/sh\nset -e\ntest -f docker/build.sh\necho {program} "$@"\n')
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([BIN / "shellcheck", DOCKER / "build.sh"], check=True)

    def build(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(DOCKER / "build.sh"), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    assert build(kind, "--pull").stdout == command.format("https://download.pytorch.org/whl") + "\n"
    assert (build("tpu").returncode, build().returncode) == (2, 2)
    assert build("tpu").stderr == "docker/build.sh: tpu: legal: gpu, cpu, sif\n"
