"""Training a byte-level BPE."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatrain.data_prep.tokenizer import EOS, Vocabulary, train
from megatrain.errors import InputError


def test_it_has_what_was_asked_for(vocabulary: Vocabulary, texts: list[str]) -> None:
    assert (vocabulary.eos_id, vocabulary.vocab_size, vocabulary.id_dtype) == (0, 600, np.dtype("<u2"))
    tokenizer = Tokenizer.from_str(vocabulary.data.decode())
    assert sorted(tokenizer.get_vocab().values()) == list(range(600))
    assert tokenizer.token_to_id(EOS) == 0
    merged = [tokenizer.decode([number]) for number in range(257, 600)]
    assert " the" in merged
    ids = tokenizer.encode(texts[0]).ids
    assert tokenizer.decode(ids) == texts[0]
    assert len(ids) < 0.5 * len(texts[0])


def test_it_does_not_depend_on_the_number_of_threads(vocabulary: Vocabulary, texts: list[str]) -> None:
    program = (
        "import json, sys; from megatrain.data_prep.tokenizer import train; "
        "sys.stdout.buffer.write(train(json.load(sys.stdin), 600).data)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(texts).encode(),
        env={"RAYON_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout == vocabulary.data


@pytest.mark.parametrize(
    ("size", "message"), [(256, "at least 257: the bytes and EOS"), (100_000, "the text has only enough for [0-9]+$")]
)
def test_a_vocabulary_that_cannot_be(size: int, message: str) -> None:
    with pytest.raises(InputError, match=f"tokenizer.vocab_size={size}: {message}"):
        train(["some text"], size)


def test_a_million_spaces_are_no_trouble() -> None:
    assert train([" " * 1_000_000 + "x", "some text " * 9], 260).vocab_size == 260


def test_without_rustbpe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(InputError, match=r"^tokenizer.train=true: rustbpe isn't installed; pip install"):
        train(["some text"], 260)
