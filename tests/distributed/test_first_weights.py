"""A run that takes its weights from a checkpoint, and nothing else: `megatrain train checkpoint=...`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatrain.__main__ import main
from megatrain.checkpoint.folders import newest
from megatrain.checkpoint.huggingface.reader import HuggingFaceReader
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.data.format import TOKENIZER
from megatrain.engines.ranges import MASTER, ShardReader
from megatrain.errors import BAD_INPUT, DONE
from tests.distributed.command import SMALL, keys, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

FP32 = ("precision=fp32", "engine.zero_stage=3")
STILL = ("max_steps=2", "optim.learning_rate=1e-30", "optim.warmup_steps=1")
"""So small a step changes no weight."""

NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
"""Of Hugging Face's configuration."""


def open_newest(run_dir: Path) -> CheckpointReader:
    folder, _ = newest(run_dir)
    assert folder is not None
    return CheckpointReader(folder)


@pytest.mark.parametrize(
    "through",
    [
        pytest.param("run directory", marks=pytest.mark.long),
        pytest.param("average", marks=pytest.mark.long),
        "Hugging Face folder",
    ],
)
def test_a_new_run_has_the_weights_and_nothing_else(
    through: str, small_set: Path, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    start, given = tmp_path / "start", uninterrupted(*FP32)
    theirs: ShardReader = open_newest(given)
    if through == "run directory":
        start = given
    elif through == "average":
        assert main(["average", f"checkpoint={given}", "last=1", f"output={start}"]) == DONE
    else:
        write_hugging_face(start, small_set)
        theirs = HuggingFaceReader(start)
    run_dir = tmp_path / "run"
    with train(small_set, run_dir, f"checkpoint={start}", *FP32, *STILL, processes=1) as command:
        command.succeed()
    ours = open_newest(run_dir)
    assert ours.optimizer_step == 2
    for name, shape in ours.shapes.items():
        size = torch.Size(shape).numel()
        assert torch.equal(ours.read(MASTER, name, 0, size), theirs.read(MASTER, name, 0, size)), name
        assert not torch.equal(ours.read("exp_avg", name, 0, size), theirs.read("exp_avg", name, 0, size)), name


def write_hugging_face(folder: Path, small_set: Path) -> None:
    """A model as transformers makes it, of the shape that SMALL says."""
    values = dict(override.removeprefix("model.").split("=") for override in SMALL if override.startswith("model."))
    config = transformers.LlamaConfig(
        **{NAMES.get(key, key): int(value) for key, value in values.items()},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(small_set / TOKENIZER, folder)


def test_other_weights_are_refused(
    small_set: Path, uninterrupted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, mean = uninterrupted(*FP32), tmp_path / "mean"
    assert main(["average", f"checkpoint={given}", "last=1", f"output={mean}"]) == DONE
    capsys.readouterr()
    other = ("model.num_kv_heads=4", "model.tie_embeddings=false")
    said = {
        (f"checkpoint={given}", *other): f"model.num_kv_heads=4: checkpoint={given} holds another model; legal: "
        "model.num_kv_heads=2 model.tie_embeddings=true",
        (f"checkpoint={tmp_path / 'none'}",): f"checkpoint={tmp_path / 'none'}: no such folder; give a run directory "
        "or the folder of a step in its checkpoints/",
        (f"run_dir={mean}",): f"run_dir={mean}: holds weights alone; legal: checkpoint={mean} and another run_dir",
    }
    for overrides, line in said.items():
        assert main(["train", *keys(small_set, tmp_path / "run", *FP32, *overrides)]) == BAD_INPUT
        assert capsys.readouterr().err == f"megatrain train: {line}\n"
