"""A real Slurm cluster of three nodes on this machine (testbed/README.md), for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTBED = Path(__file__).parent / "testbed" / "slurm_testbed"
MOST_ARRAY_TASKS = 8
CONFIGURATION = f"MaxArraySize={MOST_ARRAY_TASKS}\n"
"""An array of more jobs is refused."""
DISK = 24 << 20
"""Bytes of the nodes' small file system."""


class Cluster:
    """The cluster of the testbed. folder: its state and logs. disk: a small file system that all nodes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        configuration = folder / "extra.conf"
        configuration.write_text(CONFIGURATION)
        self._environment = {"SLURM_TESTBED_DIR": str(folder), "SLURM_TESTBED_EXTRA_CONF": str(configuration)}

    def __call__(self, verb: str, *arguments: str) -> str:
        """What a verb of the testbed prints; `slurm_testbed help` lists them."""
        command, environment = [str(TESTBED), verb, *arguments], {**os.environ, **self._environment}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if "apt-get failed" in ended.stderr:
            pytest.skip("slurm-wlm isn't installed and can't be")
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, started once for the whole test run; sbatch, squeue and the others are those of it."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster needs root")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        folder.chmod(0o711)  # munge wants its socket where everyone gets
        cluster = Cluster(folder)
        cluster.disk.mkdir()
        # Before there are nodes: what is mounted later they don't see.
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(cluster.disk)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        cluster("up", "3")
        try:
            if (folder / "bin" / "sbatch").exists():
                patch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
            else:  # The daemons are this machine's, on other ports.
                patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
            yield cluster
        finally:
            cluster("down")
            if mounted:
                subprocess.run(["umount", "--lazy", str(cluster.disk)], check=True)


@pytest.fixture
def small_disk_of_nodes(slurm: Cluster) -> Iterator[Path]:
    """A file system of DISK bytes that all nodes see, empty."""
    if not slurm.disk.is_mount():
        pytest.skip("mounting a tmpfs needs CAP_SYS_ADMIN")
    yield slurm.disk
    for path in slurm.disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
