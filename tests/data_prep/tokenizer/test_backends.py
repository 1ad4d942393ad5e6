"""Text to ids: the same ones from both backends, and which one is chosen."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatrain.data_prep.tokenizer import EOS, TIKTOKEN, TOKENIZERS, Encoder, Vocabulary, pick_backend


def changed(vocabulary: Vocabulary, **changes: Any) -> Vocabulary:
    """The vocabulary with other values at the top of its JSON, or in its model."""
    value = json.loads(vocabulary.data)
    for key, new in changes.items():
        (value if key in value else value["model"])[key] = new
    return Vocabulary(json.dumps(value).encode(), vocabulary.eos_id, vocabulary.vocab_size)


def encoded(vocabulary: Vocabulary, backend: str, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text."""
    ids, lengths = Encoder(vocabulary, backend).encode_batch(texts)
    return [each.tolist() for each in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("backend", [TIKTOKEN, TOKENIZERS])
def test_a_batch_is_one_array(vocabulary: Vocabulary, backend: str) -> None:
    encoder = Encoder(vocabulary, backend)
    ids, lengths = encoder.encode_batch(["a", "", "Q~\n"] * 70)
    assert (ids.dtype, lengths.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert lengths.tolist() == [2, 1, 4] * 70
    byte = {sign: 1 + ord(sign) for sign in "aQ~\n"}
    assert ids[:7].tolist() == [byte["a"], 0, 0, byte["Q"], byte["~"], byte["\n"], 0]
    for given_as in (pa.array(["a", "", "Q~\n"], pa.large_string()), ("a", "", "Q~\n")):
        again, _ = encoder.encode_batch(given_as)
        assert again.tolist() == ids[:7].tolist()
    nothing, none = encoder.encode_batch([])
    assert (nothing.dtype, len(nothing), none.dtype, len(none)) == (np.dtype("<u2"), 0, np.dtype("<u4"), 0)


@pytest.mark.parametrize("backend", [TIKTOKEN, TOKENIZERS])
def test_eos_is_stored_once_and_its_text_stays_text(vocabulary: Vocabulary, backend: str) -> None:
    texts = [f"a{EOS}b", EOS, "a"]
    decoder = Tokenizer.from_str(vocabulary.data.decode())
    for text, ids in zip(texts, encoded(vocabulary, backend, texts), strict=True):
        assert ids[-1] == vocabulary.eos_id
        assert vocabulary.eos_id not in ids[:-1]
        assert decoder.decode(ids[:-1], skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=200))
def test_both_backends_give_the_same_ids_and_the_text_back(vocabulary: Vocabulary, text: str) -> None:
    fast, reference = (encoded(vocabulary, backend, [text])[0] for backend in (TIKTOKEN, TOKENIZERS))
    assert fast == reference
    assert Tokenizer.from_str(vocabulary.data.decode()).decode(fast[:-1]) == text


def test_a_text_that_tiktoken_gives_up_on(vocabulary: Vocabulary) -> None:
    text = " " * 1_000_000 + "x"
    assert encoded(vocabulary, TIKTOKEN, ["a", text]) == encoded(vocabulary, TOKENIZERS, ["a", text])


def test_the_backend_is_chosen_by_trying(vocabulary: Vocabulary, texts: list[str]) -> None:
    assert pick_backend(vocabulary, texts) == (TIKTOKEN, "the same ids as tokenizers on 4 documents")


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
    first, *merges, last = json.loads(vocabulary.data)["model"]["merges"]
    unordered = changed(vocabulary, merges=[last, *merges, first])
    reason = "its ids aren't in the order of its merges"
    assert pick_backend(unordered, ["text"]) == (TOKENIZERS, f"the vocabulary isn't one for tiktoken: {reason}")


def test_other_ids_are_counted_and_leave_it_to_tokenizers(vocabulary: Vocabulary, texts: list[str]) -> None:
    """Without its last merges a vocabulary still looks exportable, but tiktoken would make these tokens."""
    merges = json.loads(vocabulary.data)["model"]["merges"]
    fewer = changed(vocabulary, merges=merges[:-150], ignore_merges=False)
    assert Encoder(fewer, TIKTOKEN).check([*texts, "x"]) == 3
    assert Encoder(fewer, TOKENIZERS).check(texts) == 0
    assert pick_backend(fewer, texts) == (TOKENIZERS, "tiktoken gave other ids on 3 of 4 documents")
