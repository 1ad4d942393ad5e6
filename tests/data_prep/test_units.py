"""Units by themselves: ids that differ, counts, sides."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megatrain.data_prep.config import PrepConfig
from megatrain.data_prep.files import said
from megatrain.data_prep.plan import find_inputs, plan_units
from megatrain.data_prep.results import Results
from megatrain.data_prep.tokenizer import TIKTOKEN, TOKENIZERS, Encoder
from megatrain.data_prep.units import Settings, StoredTokenizer, is_held_out, prepare, text_digests, words
from tests.tokenizer import make_tokenizer


def stored(folder: Path, backend: str) -> StoredTokenizer:
    path = make_tokenizer(folder / "tokenizer.json")
    return StoredTokenizer(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 0, 300, backend)


def test_a_unit_with_other_ids_is_encoded_by_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"the words of text {number}" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepConfig(input=str(tmp_path / "a.jsonl"), output="out", held_out_share=0.0)
    settings = Settings(config, stored(tmp_path, TIKTOKEN))
    (task,) = plan_units(find_inputs(config), settings, tmp_path / "units")
    used: list[str] = []
    make, encode = Encoder.__init__, Encoder.encode_batch

    def note_backend(self: Encoder, vocabulary: Any, backend: str) -> None:
        make(self, vocabulary, backend)
        monkeypatch.setattr(self, "backend", backend, raising=False)

    def note_use(self: Encoder, *arguments: object) -> object:
        used.append(self.backend)  # type: ignore[attr-defined]
        return encode(self, *arguments)

    monkeypatch.setattr(Encoder, "__init__", note_backend)
    monkeypatch.setattr(Encoder, "encode_batch", note_use)
    monkeypatch.setattr(Encoder, "check", lambda _, texts: len(texts) // 8)
    documents, tokens = prepare(task, settings)
    assert used == [TIKTOKEN, TOKENIZERS]
    counts = said(Path(task.folder))["counts"]
    assert (counts["compared"], counts["different"]) == (config.tokenizer.parity_documents, 2)
    assert (documents, counts["records"]) == (40, 40)
    results = Results(Path(task.folder), "train", np.dtype("<u2"))
    assert (len(results.lengths), int(results.lengths.sum())) == (40, tokens)
    assert prepare(task, settings) == (documents, tokens)
    assert len(used) == 2


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1)


@given(texts=TEXTS, first=st.integers(0, 3))
def test_texts_are_measured_where_they_lie(texts: list[str], first: int) -> None:
    """Also in a slice of a larger array."""
    array = pa.array(["before"] * first + texts, pa.large_string()).slice(first)
    assert text_digests(array).tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
    spaces = "".join(map(chr, range(33)))
    expected = [len(text.translate(dict.fromkeys(map(ord, spaces), " ")).split(" ")) for text in texts]
    assert words(array).tolist() == [
        count - text.translate(dict.fromkeys(map(ord, spaces), " ")).split(" ").count("")
        for count, text in zip(expected, texts, strict=True)
    ]


def test_the_share_that_is_held_out() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    assert not is_held_out(digests, 0.0).any()
    assert 0.045 < is_held_out(digests, 0.05).mean() < 0.055
