"""docker/Dockerfile.cpu, step by step, and what it makes: `make test-docker`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.chroot import Image
from tests.docker.dockerfile import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

SMALL = "model.num_layers=1 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=2 model.intermediate_size=64"
TEXT = "Ranks meet, share what they hold, and train a step. Then they write down where they are, and go on.\n"


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    # Not below pytest's folder: only its owner may enter that, and the image's user is another.
    with tempfile.TemporaryDirectory(prefix="megatrain-image-") as name:
        Path(name).chmod(0o755)
        built = Image(Path(name) / "root", {"TORCH_INDEX": os.environ.get("TORCH_INDEX", "")})
        built.build(ROOT / "docker" / "Dockerfile.cpu")
        yield built


def test_it_answers_as_a_user_that_is_not_root(image: Image) -> None:
    assert image.run(["id", "-u"]).strip() == "1000"
    assert image.run(["pwd"]).strip() == "/home/megatrain"
    assert "megatrain COMMAND" in image.run(image.health)


def versions(lines: str) -> dict[str, str]:
    """Each package's version; a local part (+cpu) is left out, as pip does where it compares."""
    pairs = (line.lower().replace("_", "-").split("==") for line in lines.splitlines() if "==" in line)
    return {name: version.partition("+")[0] for name, version in pairs}


def test_its_versions_are_those_of_constraints(image: Image) -> None:
    pins = versions((ROOT / "constraints.txt").read_text())
    installed = versions(image.run(["pip", "list", "--format=freeze"]))
    assert {"torch", "deepspeed", "megatrain"} <= installed.keys()
    assert {name: installed[name] for name in pins.keys() & installed.keys() if installed[name] != pins[name]} == {}
    # What comes with Python's own environment, and what is built here, has no pin.
    assert installed.keys() - pins.keys() <= {"megatrain", "pip", "setuptools", "wheel"}


def test_it_prepares_and_trains(image: Image) -> None:
    home = image.root / "home" / "megatrain"
    (home / "text.txt").write_text(TEXT * 400)
    prep = "prep input=text.txt output=shards tokenizer.train=true tokenizer.vocab_size=300 workers=1"
    image.run([*image.entrypoint, *prep.split()], HOME="/home/megatrain")
    keys = f"{SMALL} data.path=shards run_dir=run max_steps=2 global_batch_size=2 sequence_length=64 precision=fp32"
    train = f"train {keys} model.vocab_size=512 launch.processes=2 logger.wandb.mode=disabled"
    image.run([*image.entrypoint, *train.split()], HOME="/home/megatrain", OMP_NUM_THREADS="1")
    assert '"reason": "step 2 of 2"' in (home / "run" / "outcome.json").read_text()
    with pytest.raises(subprocess.CalledProcessError) as wrong:
        image.run([*image.entrypoint, "train", "max_step=2"])
    assert wrong.value.returncode == 2
