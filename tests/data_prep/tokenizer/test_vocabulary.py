"""Reading a tokenizer.json, and what a folder holds; EOS."""

import json
from pathlib import Path

import pytest

from megatrain.data_prep.tokenizer import EOS, Vocabulary, load
from megatrain.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.data)
    return tmp_path


def test_a_tokenizer_json_is_kept_as_it_is(folder: Path, vocabulary: Vocabulary) -> None:
    assert load(folder, None) == load(folder / "tokenizer.json", EOS) == vocabulary


@pytest.mark.parametrize("token", ["<end>", {"content": "<end>"}])
def test_the_configuration_beside_it_names_eos(folder: Path, vocabulary: Vocabulary, token: object) -> None:
    value = json.loads(vocabulary.data)
    special = value["added_tokens"][0] | {"id": 600, "content": "<end>"}
    (folder / "tokenizer.json").write_text(json.dumps(value | {"added_tokens": [*value["added_tokens"], special]}))
    config = json.dumps({"eos_token": token})
    (folder / "tokenizer_config.json").write_text(config)
    found = load(folder, None)
    assert (found.eos_id, found.vocab_size) == (600, 601)
    assert load(folder, EOS).eos_id == 0


def test_a_configuration_that_is_no_object(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config.json: not a JSON object"):
        load(folder, None)


def test_an_eos_that_the_vocabulary_lacks(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^tokenizer.eos_token=<end>: no token of .*tokenizer.json$"):
        load(folder, "<end>")


def test_an_eos_that_cannot_be_told_from_text(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^tokenizer.eos_token=Ġthe: ' the' in a document is encoded as the same id$"):
        load(folder, "Ġthe")


def test_no_usual_eos(folder: Path, vocabulary: Vocabulary) -> None:
    (folder / "tokenizer.json").write_bytes(vocabulary.data.replace(EOS.encode(), b"<end>"))
    with pytest.raises(InputError, match=r"tokenizer.json doesn't tell its EOS; give the token that ends a document$"):
        load(folder, None)
    assert load(folder, "<end>").eos_id == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory$"),
        (b"{}", r"no usable Hugging Face tokenizer.json \("),
        (b"YQ== 0\nYg==\n", r"no usable tiktoken file \("),
        (b"", r"no usable .* or SentencePiece model \(not a SentencePiece model\)$"),
        (b"\xff\xfe text", r"no usable .* or SentencePiece model \(not a SentencePiece model\)$"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=f"^tokenizer.path=.*: {message}"):
        load(tmp_path, None, "r50k_base" if content and content[:1] == b"Y" else None)


def test_a_split_is_only_for_what_lacks_one(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"^tokenizer.split=.: only for a tiktoken file, which .*tokenizer.json isn't$"
    ):
        load(folder, None, ".")
