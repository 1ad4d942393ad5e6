"""Loss, perplexity and bits per byte, of functions and through `megatrain eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.__main__ import main
from megatrain.batch import IGNORE
from megatrain.config import Precision
from megatrain.evaluate.loading import load_model
from megatrain.evaluate.perplexity import evaluate, split, text_sequences
from megatrain.objectives.causal import Causal
from tests import samples
from tests.evaluate.conftest import DOCUMENTS, LENGTH, MODEL, Run
from tests.tokenizer import load

TEXT = "The words of Ünïcode 汉字 and\n  the tests of them, again and again. " * 3


@given(st.integers(2, 60), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_id_of_a_text_but_the_first_is_predicted_once(count: int, length: int) -> None:
    batch = Causal(document_mask=True)(text_sequences(torch.arange(1, count + 1, dtype=torch.int32), length))
    real = batch.targets != IGNORE
    assert batch.targets[real].tolist() == list(range(2, count + 1))
    assert torch.equal(batch.input_ids[real] + 1, batch.targets[real])
    assert (batch.start[real] == 0).all()


def test_scores_do_not_depend_on_batches(trained: Run) -> None:
    model = load_model(trained.reader, MODEL, Precision.fp64)
    whole = samples.batch(samples=7, sequence_length=LENGTH, seed=0)
    targets = int((whole.targets != IGNORE).sum())
    scores = [evaluate(model, split(whole, size), 100) for size in (1, 3, 7)]
    assert {score.targets for score in scores} == {targets}
    assert scores[0].loss == pytest.approx(scores[2].loss, abs=1e-12)
    assert scores[1].perplexity == pytest.approx(math.exp(scores[2].loss), abs=1e-9)
    assert scores[1].bits_per_byte == pytest.approx(scores[2].loss * targets / math.log(2) / 100)


def test_nothing_to_predict_is_an_error(trained: Run) -> None:
    model = load_model(trained.reader, MODEL, Precision.fp32)
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate(model, [samples.empty_like(samples.batch(samples=1, sequence_length=4, seed=0))])


def test_a_text_file(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    arguments = [f"checkpoint={trained.run_dir}", f"text={tmp_path / 'a.txt'}", f"output={tmp_path / 'out.json'}"]
    assert main(["eval", *arguments, "sequence_length=4096"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    ids = torch.tensor([load(trained.run_dir / "tokenizer.json").encode(TEXT).ids], dtype=torch.int32)
    model = load_model(trained.reader, MODEL, Precision.fp32)
    positions = torch.arange(ids.shape[1], dtype=torch.int32)[None]
    logits = model(ids, positions, torch.zeros_like(ids))[0, :-1]
    loss = F.cross_entropy(logits, ids[0, 1:].long()).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["bytes"] == len(TEXT.encode()) - 1
    assert result["bits_per_byte"] == pytest.approx(loss * (ids.shape[1] - 1) / math.log(2) / result["bytes"], rel=1e-5)
    assert (result["step"], result["samples"], result["model"]) == (3, 1, "small")
    assert "bits per byte" in capsys.readouterr().out


def test_the_held_out_split(trained: Run, tmp_path: Path) -> None:
    arguments = ["eval", f"checkpoint={trained.run_dir}", f"data.path={trained.data}", "precision=fp64"]
    results = []
    for size in (1, 4):
        assert main([*arguments, f"output={tmp_path / 'out.json'}", f"micro_batch_size={size}"]) == 0
        results.append(json.loads((tmp_path / "out.json").read_text()))
    encoded = [load(trained.data / "tokenizer.json").encode(text).ids for text in DOCUMENTS]
    # Every token is predicted, EOS too, but the first of each document.
    assert results[0]["targets"] == sum(map(len, encoded))
    firsts = [load(trained.data / "tokenizer.json").decode(ids[:1]) for ids in encoded]
    assert results[0]["bytes"] == sum(map(len, DOCUMENTS)) - sum(map(len, firsts))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-12)
    assert main([*arguments, f"output={tmp_path / 'out.json'}", "max_samples=2"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["samples"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.path or text: give one of them"),
        (["text={tmp}/missing.txt"], "text={tmp}/missing.txt: No such file"),
        (["text={tmp}/latin1.txt"], "text={tmp}/latin1.txt: not UTF-8 (byte 1)"),
        (["text={tmp}/short.txt"], "text={tmp}/short.txt: has 1 tokens"),
        (["data.path={tmp}"], "{tmp}: no held_out/manifest.json in it"),
        (["text={tmp}/short.txt", "micro_batch_size=0"], "micro_batch_size=0: has to be at least 1"),
        (["text={tmp}/short.txt", "output={tmp}/no/folder.json"], "output={tmp}/no/folder.json: its folder"),
    ],
)
def test_bad_input_is_one_line(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("aé".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert main(["eval", f"checkpoint={trained.run_dir}", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatrain eval: {message.format(tmp=tmp_path)}")
    assert error.count("\n") == 1
