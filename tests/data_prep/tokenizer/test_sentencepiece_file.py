"""SentencePiece models, against sentencepiece itself."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.tokenizer import TOKENIZERS, Encoder, Vocabulary, load, pick_backend, sentencepiece_file
from megatrain.errors import InputError

LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
"""How the models of Llama were trained; these have pieces of several spaces."""
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "words": LLAMA | {"allow_whitespace_only_pieces": False},
    "gemma": LLAMA | {"add_dummy_prefix": False, "user_defined_symbols": ["<start>", "\t\t"]},
    "mistral": LLAMA | {"user_defined_symbols": ["[INST]"]},
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
}


@pytest.fixture(scope="module")
def models(texts: list[str]) -> dict[str, bytes]:
    """Small models of several kinds."""
    found = {}
    lines = [line for text in texts for line in text.splitlines() if line]
    for name, options in KINDS.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, vocab_size=700, minloglevel=2,
            num_threads=1, hard_vocab_limit=False, **options,
        )  # fmt: skip
        found[name] = written.getvalue()
    return found


def loaded(model: bytes, folder: Path) -> Vocabulary:
    (folder / "tokenizer.model").write_bytes(model)
    return load(folder, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_sentencepiece(
    models: dict[str, bytes], texts: list[str], tmp_path: Path, kind: str
) -> None:
    vocabulary = loaded(models[kind], tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    assert (vocabulary.eos_id, vocabulary.vocab_size) == (original.eos_id(), original.get_piece_size())
    assert pick_backend(vocabulary, texts) == (TOKENIZERS, "the vocabulary isn't one for tiktoken: not a plain BPE")
    assert Encoder(vocabulary, TOKENIZERS).encode_batch(["</s>"])[0].tolist().count(vocabulary.eos_id) == 1
    text = "def f(x):\n    return 1  # a b"
    assert vocabulary.tokenizer().decode(original.encode(text)) == original.decode(original.encode(text))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ab \t\n</s>é中_▁1☃"), max_size=40))
@pytest.mark.parametrize("kind", KINDS)
def test_any_text(models: dict[str, bytes], kind: str, text: str) -> None:
    data, _ = sentencepiece_file.convert(models[kind])
    tokenizer = Vocabulary(data, 2, 700).tokenizer()
    original = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text)


def test_a_symbol_of_the_user_is_found_in_text(models: dict[str, bytes], tmp_path: Path) -> None:
    tokenizer = loaded(models["gemma"], tmp_path).tokenizer()
    ids = sentencepiece.SentencePieceProcessor(model_proto=models["gemma"]).encode("a<start>b <start> \t\tc")
    assert tokenizer.encode("a<start>b <start> \t\tc", add_special_tokens=False).ids == ids
    assert ids.count(tokenizer.token_to_id("<start>")) == 2


def test_but_not_where_a_space_is_put_before_the_text(models: dict[str, bytes], tmp_path: Path) -> None:
    tokenizer = loaded(models["mistral"], tmp_path).tokenizer()
    ids = tokenizer.encode("a [INST]b", add_special_tokens=False).ids
    assert tokenizer.token_to_id("[INST]") not in ids
    assert tokenizer.decode(ids) == "a [INST]b"


def test_a_difference_on_this_input_is_refused(models: dict[str, bytes], tmp_path: Path) -> None:
    vocabulary = loaded(models["words"], tmp_path)
    other = Vocabulary(vocabulary.data, 2, vocabulary.vocab_size, models["llama"])
    with pytest.raises(
        InputError, match=r"^tokenizer.path=a SentencePiece model: .* differs on \d+ documents of this input$"
    ):
        pick_backend(other, ["def f(x):\n        return 1"] * 3)


def test_what_cannot_be_converted(models: dict[str, bytes], tmp_path: Path) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(models["llama"])
    proto.trainer_spec.treat_whitespace_as_suffix = True
    with pytest.raises(InputError, match=r"\(only BPE and unigram models with spaces before words can be converted\)$"):
        loaded(proto.SerializeToString(), tmp_path)
    proto = ModelProto.FromString(models["llama"])
    proto.pieces[300].type = sentencepiece_file.UNUSED
    with pytest.raises(InputError, match=r"\(it has unused pieces\)$"):
        loaded(proto.SerializeToString(), tmp_path)


def test_without_sentencepiece(models: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(InputError, match=r"^tokenizer.path: a SentencePiece model; pip install 'megatrain\[prep\]'$"):
        loaded(models["llama"], tmp_path)
