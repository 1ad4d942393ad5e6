"""Generation: transformers' greedy text, sampling by seed and by the right odds, and the commands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from megatrain.__main__ import main
from megatrain.config import Precision
from megatrain.evaluate.generate import generate, sample
from megatrain.evaluate.loading import load_model
from megatrain.model.transformer import Transformer
from tests.evaluate.conftest import MODEL, Run
from tests.tokenizer import load

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(trained: Run) -> Transformer:
    return load_model(trained.reader, MODEL, Precision.fp32)


def text(model: Transformer, temperature: float, top_k: int = 0, seed: int = 0, eos_id: int = -1) -> list[int]:
    return list(generate(model, PROMPT, 12, temperature, top_k, seed, eos_id))


def test_a_seed_is_a_text(model: Transformer) -> None:
    first = text(model, temperature=1.0)
    assert len(first) == 12
    assert text(model, temperature=1.0) == first
    assert text(model, temperature=1.0, seed=1) != first
    assert text(model, temperature=1.0, top_k=1) == text(model, temperature=0.0)


def test_it_ends_before_the_end_of_the_document(model: Transformer) -> None:
    ids = text(model, temperature=1.0)
    assert text(model, temperature=1.0, eos_id=ids[4]) == ids[: ids.index(ids[4])]


def test_odds() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sample(logits, 0.5, 2, generator) for _ in range(4000))
    assert set(counts) == {1, 2}
    assert counts[2] / 4000 == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()), abs=0.02)
    everything = Counter(sample(logits, 1.0, 0, generator) for _ in range(4000))
    assert everything[0] / 4000 == pytest.approx(logits.softmax(0)[0].item(), abs=0.02)


def test_the_exported_model_says_the_same(
    trained: Run, tmp_path: Path, model: Transformer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"checkpoint={trained.run_dir}", f"output={tmp_path / 'hf'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    said = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    assert text(model, temperature=0.0, eos_id=0) == [id_ for id_ in said if id_ != 0]


def test_the_command_prints_prompt_and_text(
    trained: Run, model: Transformer, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "the words = [of], {them}"
    arguments = [f"checkpoint={trained.run_dir}", f"prompt={prompt}", "max_new_tokens=20", "seed=3", "top_k=40"]
    assert main(["generate", *arguments]) == 0
    tokenizer = load(trained.run_dir / "tokenizer.json")
    ids = tokenizer.encode(prompt).ids
    expected = tokenizer.decode([*ids, *generate(model, ids, 20, 0.8, 40, 3, 0)])
    printed = capsys.readouterr().out
    assert printed.startswith(prompt)
    assert printed.rstrip("\n") == expected.rstrip("\ufffd\n")
    assert main(["generate", arguments[0], "max_new_tokens=3"]) == 0


def test_bad_input_is_one_line(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"checkpoint={trained.run_dir}", "temperature=-1"]) == 2
    assert capsys.readouterr().err == "megatrain generate: temperature=-1.0: has to be at least 0\n"
    assert main(["generate", f"checkpoint={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"megatrain generate: checkpoint={tmp_path}: holds no checkpoint")
