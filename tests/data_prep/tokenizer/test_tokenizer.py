"""Text to ids: training, loading, and the same ids from both backends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatrain.data_prep.tokenizer import (
    EOS,
    TIKTOKEN,
    TOKENIZERS,
    Encoder,
    Vocabulary,
    load,
    pick_backend,
    train,
)
from megatrain.errors import InputError

TEXTS = [
    Path(__file__).read_text(),
    Path(json.__file__).read_text(),
    "naïve café 中文文本 हिन्दी 👩‍🚀 don't DON'T 12345",
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train(TEXTS, 600)


def changed(vocabulary: Vocabulary, **changes: Any) -> Vocabulary:
    """The vocabulary with other values at the top of its JSON, or in its model."""
    value = json.loads(vocabulary.data)
    for key, new in changes.items():
        (value if key in value else value["model"])[key] = new
    return Vocabulary(json.dumps(value).encode(), vocabulary.eos_id, vocabulary.vocab_size)


def test_training_gives_what_was_asked_for_and_always_the_same(vocabulary: Vocabulary) -> None:
    assert (vocabulary.eos_id, vocabulary.vocab_size, vocabulary.id_dtype) == (0, 600, np.dtype("<u2"))
    assert train(iter(TEXTS), 600).data == vocabulary.data


@pytest.mark.parametrize(
    ("size", "message"), [(256, "at least 257: the bytes and EOS"), (100_000, "the text has only enough for [0-9]+$")]
)
def test_a_vocabulary_that_cannot_be(size: int, message: str) -> None:
    with pytest.raises(InputError, match=f"tokenizer.vocab_size={size}: {message}"):
        train(["some text"], size)


@pytest.mark.parametrize("backend", [TIKTOKEN, TOKENIZERS])
def test_eos_is_stored_once_and_its_text_stays_text(vocabulary: Vocabulary, backend: str) -> None:
    texts = [f"a{EOS}b", EOS, "a"]
    encoded = Encoder(vocabulary, backend).encode(texts)
    decoder = Tokenizer.from_str(vocabulary.data.decode())
    for text, ids in zip(texts, encoded, strict=True):
        assert ids.dtype == np.dtype("<u2")
        assert ids[-1] == vocabulary.eos_id
        assert vocabulary.eos_id not in ids[:-1]
        assert decoder.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=200))
def test_both_backends_give_the_same_ids_and_the_text_back(vocabulary: Vocabulary, text: str) -> None:
    fast, reference = (Encoder(vocabulary, backend).encode([text])[0] for backend in (TIKTOKEN, TOKENIZERS))
    assert fast.tolist() == reference.tolist()
    assert Tokenizer.from_str(vocabulary.data.decode()).decode(fast[:-1].tolist()) == text


def test_a_text_that_tiktoken_gives_up_on(vocabulary: Vocabulary) -> None:
    text = " " * 1_000_000 + "x"
    fast, reference = (Encoder(vocabulary, backend).encode([text])[0] for backend in (TIKTOKEN, TOKENIZERS))
    assert np.array_equal(fast, reference)


def test_the_backend_is_chosen_by_trying(vocabulary: Vocabulary) -> None:
    assert pick_backend(vocabulary, TEXTS) == (TIKTOKEN, "the same ids as tokenizers on 3 documents")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "it normalizes text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it splits text in another way"),
        ({"dropout": 0.5}, "not a plain BPE"),
        ({"vocab": {"a": 0, "b": 1}, "merges": []}, "it lacks some bytes"),
        ({"vocab": {"中": 0}, "merges": []}, "it isn't byte-level"),
    ],
)
def test_what_tiktoken_cannot_hold_is_left_to_tokenizers(
    vocabulary: Vocabulary, changes: dict[str, Any], reason: str
) -> None:
    backend, why = pick_backend(changed(vocabulary, **changes), ["text"])
    assert (backend, why) == (TOKENIZERS, f"the vocabulary isn't one for tiktoken: {reason}")


def test_ids_out_of_order_of_merges(vocabulary: Vocabulary) -> None:
    *merges, second_last, last = json.loads(vocabulary.data)["model"]["merges"]
    unordered = changed(vocabulary, merges=[*merges, last, second_last])
    reason = "its ids aren't in the order of its merges"
    assert pick_backend(unordered, ["text"]) == (TOKENIZERS, f"the vocabulary isn't one for tiktoken: {reason}")


def test_other_ids_on_the_input_leave_it_to_tokenizers(vocabulary: Vocabulary) -> None:
    """Without its last merges a vocabulary still looks exportable, but tiktoken would make these tokens."""
    merges = json.loads(vocabulary.data)["model"]["merges"]
    backend, why = pick_backend(changed(vocabulary, merges=merges[:100]), TEXTS)
    assert (backend, why) == (TOKENIZERS, "tiktoken gave other ids on 3 of 3 documents")


def test_truncation_and_bos_of_a_tokenizer_are_not_applied(vocabulary: Vocabulary, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(vocabulary.data.decode())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path, None)
    assert loaded.data == (tmp_path / "tokenizer.json").read_bytes()
    for backend in (TIKTOKEN, TOKENIZERS):
        assert np.array_equal(
            Encoder(loaded, backend).encode(["a longer text"])[0],
            Encoder(vocabulary, backend).encode(["a longer text"])[0],
        )


def test_where_eos_is_found(vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(vocabulary.data)
    assert load(file, None).eos_id == 0
    assert load(tmp_path, "a").eos_id == Tokenizer.from_file(str(file)).token_to_id("a")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "b"}}))
    assert load(tmp_path, None).eos_id == Tokenizer.from_file(str(file)).token_to_id("b")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(InputError, match=r"tokenizer.eos_token=<none>: no token of .*tokenizer.json"):
        load(tmp_path, None)


def test_an_eos_that_cannot_be_told(vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(vocabulary.data.replace(EOS.encode(), b"<|strange|>"))
    with pytest.raises(InputError, match=r"tokenizer.eos_token: .*other.json doesn't tell its EOS"):
        load(file, None)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.path=.*: No such file"):
        load(tmp_path, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.path=.*: not a Hugging Face tokenizer.json"):
        load(tmp_path, None)
