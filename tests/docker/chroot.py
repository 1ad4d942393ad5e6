"""Does the steps of docker/Dockerfile.cpu where there is no Docker: in a folder that is a root of its own.

Design choices:
- The base image, python:3.11-slim-bookworm, is stood in for by the same Debian from debootstrap with Debian's Python
  3.11, put to /usr/local as the image has its own. All other instructions are done as they stand.
- Each command runs in new mount and process namespaces, so that nothing stays mounted and no process is left. The
  network is this machine's, and so are pip's settings in the environment (PIP_*) and the certificates.
- COPY takes what git knows or would take; that .dockerignore leaves out no more is test_files.py's to check.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.docker.dockerfile import ROOT, Instruction, parse

MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
SECONDS = 1800
"""How long one step may take."""


class Image:
    """A root folder and what the instructions have said of what runs in it."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        """arguments: what `docker build --build-arg` would be given."""
        self.root = root
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"}
        self.entrypoint: list[str] = []
        self.health: list[str] = []
        self._given = arguments
        self._arguments: dict[str, str] = {}
        self._folder = "/"
        self._user = "0"
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self._machine = {**settings, "SSL_CERT_FILE": str(CERTIFICATES)}
        self._wheels = [folder for folder in settings.get("PIP_FIND_LINKS", "").split() if Path(folder).is_dir()]

    def build(self, dockerfile: Path) -> None:
        """Does every instruction. Raises CalledProcessError where a command fails."""
        for instruction in parse(dockerfile):
            print(f"{dockerfile.name}:{instruction.line} {instruction.name} {instruction.text}", flush=True)
            self._do(instruction)

    def run(self, command: Sequence[str], **more: str) -> str:
        """What a command prints, run as the image's user. more: environment variables. Raises CalledProcessError."""
        return self._run(command, more, subprocess.PIPE)

    def _do(self, instruction: Instruction) -> None:
        text = instruction.text
        match instruction.name:
            case "FROM":
                self._make_base(text)
            case "ENV":
                self.environment |= dict(word.split("=", 1) for word in shlex.split(text))
            case "ARG":
                name, _, default = shlex.split(text)[0].partition("=")
                self._arguments[name] = self._given.get(name, default)
            case "RUN":
                self._run(["/bin/sh", "-c", text], {**self._machine, **self._arguments}, None)
            case "COPY":
                self._copy(*text.split())
            case "WORKDIR":
                self._folder = text
                (self.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                self._user = text
            case "ENTRYPOINT":
                self.entrypoint = instruction.words()
            case "HEALTHCHECK":
                self.health = instruction.words()
            case "CMD":
                pass  # A default for people.

    def _make_base(self, name: str) -> None:
        assert name == "python:3.11-slim-bookworm", f"{name}: nothing stands in for this base"
        packages = "--include=ca-certificates,python3-venv"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(self.root), MIRROR]
        subprocess.run(command, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        # As Docker does, for ranks that meet by this machine's name.
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n::1 localhost\n")
        shutil.copy(CERTIFICATES, self.root / str(CERTIFICATES).lstrip("/"))
        self._run(["python3", "-m", "venv", "/usr/local"], {}, None)

    def _copy(self, source: str, target: str) -> None:
        goal = self.root / (Path(self._folder) / target).relative_to("/")
        if source != ".":
            shutil.copy(ROOT / source, goal)
            return
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        there = [name for name in listed.decode().split("\0") if name and os.path.lexists(ROOT / name)]
        for name in there:
            (goal / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, goal / name, follow_symlinks=False)

    def _run(self, command: Sequence[str], more: dict[str, str], stdout: int | None) -> str:
        """Runs a command in the root, in namespaces of its own; devices, /proc and pip's wheels are mounted there."""
        mounts = [f"mount --rbind /dev {self.root}/dev"]
        for folder in self._wheels:
            inside = self.root / folder.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind -o ro {shlex.quote(folder)} {shlex.quote(str(inside))}")
        settings = [f"{name}={value}" for name, value in {**self.environment, **more}.items()]
        step = ["env", "-i", *settings, "sh", "-c", f'cd {shlex.quote(self._folder)} && exec "$@"', "sh", *command]
        user = f"--userspec={self._user}:{self._user}"
        script = " && ".join([*mounts, f"exec {shlex.join(['chroot', user, str(self.root), *step])}"])
        namespaces = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={self.root}/proc"]
        whole = [*namespaces, "sh", "-c", script]
        ended = subprocess.run(whole, check=True, timeout=SECONDS, stdout=stdout, text=True)
        return ended.stdout or ""
