"""Checkpoints in an object store: copied, found again and read by range, from memory, a folder and a real S3 server."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
import torch

from megatrain.checkpoint import remote as remotes
from megatrain.checkpoint.folders import newest, resolve, step_folder
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.engines.ranges import MASTER
from tests.checkpoint.layouts import even_layout, random_whole, write

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (500, 200), "head": (200, 500)}
WHOLE = random_whole(SHAPES)
RANKS = 2


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    return {"memory": f"memory://{uuid4().hex}/run", "file": f"file:{tmp_path}/remote/run"}[request.param]


def save(run_dir: Path, step: int) -> Path:
    folder = step_folder(run_dir, step)
    write(folder, even_layout(SHAPES, RANKS), WHOLE, step)
    return folder


def upload(folder: Path, url: str) -> None:
    remote = remotes.root(url)
    for rank in range(RANKS):
        remotes.upload_rank(folder, remote, rank)
    remotes.upload_commit(folder, remote)


def test_what_was_copied_is_found_and_read(tmp_path: Path, url: str) -> None:
    assert newest(tmp_path / "run", url) == (None, [])
    upload(save(tmp_path / "run", 10), url)
    found, passed_over = newest(tmp_path / "empty", url)
    assert found == step_folder(remotes.root(url), 10) == resolve(url) == resolve(f"{url}/checkpoints/step_00000010")
    assert passed_over == []
    assert found is not None
    reader = CheckpointReader(found)
    part = reader.read(MASTER, "head", 40_000, 60_123)
    assert torch.equal(part.view(torch.int32), WHOLE["head"][MASTER].flatten()[40_000:60_123].view(torch.int32))
    reader.verify_all()
    remotes.remove(found)
    assert newest(tmp_path / "empty", url) == (None, [])
