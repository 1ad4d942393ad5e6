"""Export's peak memory, of a real process: twice the largest tensor and 300 MB, whatever the model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.huggingface.tensors import tensors
from megatrain.checkpoint.weights import write_weights
from megatrain.config import ModelConfig
from megatrain.model.initialization import InitialWeights
from megatrain.model.spec import parameter_count

MODEL = ModelConfig(
    name="large",
    vocab_size=16384,
    hidden_size=4096,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    intermediate_size=16384,
    tie_embeddings=True,
)
"""1.2 GB of masters; the largest tensors are the embedding and the MLP's, which are fused or transposed in ours."""

PROGRAM = """
import sys
from pathlib import Path
import torch
from megatrain.checkpoint.huggingface.export import export
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import Precision
from tests.checkpoint.huggingface.test_memory import MODEL

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

checkpoint, tokenizer, output = sys.argv[1:]
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
before = memory("VmRSS")
export(CheckpointReader(Path(checkpoint)), MODEL, Path(tokenizer), Path(output), Precision.bf16, 64, 0)
print(memory("VmHWM") - before)
"""


class Cheap(InitialWeights):
    """Values that are quick to make."""

    def read(self, state: str, name: str, start: int, stop: int) -> torch.Tensor:  # noqa: ARG002
        return torch.arange(start, stop).remainder_(251).float()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run")
    state = TrainerState(
        step=1, optimizer_step=1, samples=1, data={}, config={}, tokenizer={}, wandb_run_id=None, weights_only=True
    )
    yield write_weights(folder, MODEL, Cheap(MODEL, seed=0), state)
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_export_streams(checkpoint: Path, tokenizer: Path, tmp_path: Path) -> None:
    """In bf16, of which the masters that are read are twice the size."""
    arguments = [str(checkpoint), str(tokenizer), str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=100, check=True
    )
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    written = weights.stat().st_size
    shutil.rmtree(tmp_path / "out")
    allowed = 2 * 2 * max(tensor.size for tensor in tensors(MODEL)) + 300_000_000
    assert written > 2 * parameter_count(MODEL) > allowed
    assert 0 < int(ended.stdout) <= allowed
