"""tiktoken files, against tiktoken itself."""

import base64
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megatrain.data_prep.tokenizer import EOS, TIKTOKEN, Encoder, load, pick_backend, tiktoken_file
from megatrain.data_prep.tokenizer.byte_level import SPLIT, alphabet
from megatrain.data_prep.tokenizer.export import to_tiktoken
from megatrain.data_prep.tokenizer.vocabulary import Vocabulary
from megatrain.errors import InputError

SIGNS = {byte: sign for sign, byte in alphabet().items()}


@pytest.fixture(scope="module")
def ranks(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The bytes of the tokens of the small vocabulary, and their ranks."""
    encoding = to_tiktoken(vocabulary.data)
    return {encoding.decode_single_token_bytes(number): number - 1 for number in range(1, 600)}


@pytest.fixture
def file(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> tuple[Encoder, tiktoken.Encoding]:
    path = tmp_path_factory.mktemp("tiktoken") / "small.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    original = tiktoken.Encoding("small", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOS: 599})
    return Encoder(load(path, None, SPLIT), "tokenizers"), original


def test_a_regex_and_the_eos_that_is_added(file: Path, texts: list[str]) -> None:
    found = load(file.parent, None, SPLIT)
    assert (found.eos_id, found.vocab_size) == (599, 600)
    assert load(file, "<end>", SPLIT).eos_id == 599
    assert pick_backend(found, texts)[0] == TIKTOKEN


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_the_ids_are_those_of_tiktoken(converted: tuple[Encoder, tiktoken.Encoding], text: str) -> None:
    encoder, original = converted
    ids, _ = encoder.encode_batch([text])
    assert ids.tolist() == [*original.encode_ordinary(text), original.eot_token]


@pytest.mark.parametrize(("name", "expected"), tiktoken_file.ENCODINGS.items())
def test_the_published_encodings_split_as_tiktoken_does(name: str, expected: tiktoken_file.Encoding) -> None:
    """The patterns that the package has, with a vocabulary of bytes alone: its own files would have to be fetched."""
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in bytes_only.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: bytes_only)
        published = getattr(openai_public, name)()
    assert published["special_tokens"].items() >= expected.special.items()
    tokenizer = Vocabulary(tiktoken_file.convert(lines, name, EOS), 0, 2**18).tokenizer()
    for text in ("It's  DON'T 12345 naïve\r\n\n  中文 a/b?!\n x\t\ty   ", "ǅungla I'Ll 1½ x'S  \n"):
        words = [token for token, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert words == [
            "".join(SIGNS[byte] for byte in word.encode()) for word in regex.findall(published["pat_str"], text)
        ]


def test_a_name_that_the_file_cannot_be(file: Path) -> None:
    extra = file.read_bytes() + b"%s 50256\n" % base64.b64encode(b"some more")
    file.write_bytes(extra)
    with pytest.raises(InputError, match=r"^tokenizer.split=r50k_base: the file isn't of this encoding: .*endoftext"):
        load(file, None, "r50k_base")


def test_what_is_missing(file: Path) -> None:
    with pytest.raises(InputError, match=r"is a tiktoken file; give its encoding \(r50k_base, .*\) or a regex$"):
        load(file, None)
    file.write_bytes(file.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(InputError, match=r"no usable tiktoken file \(it lacks some bytes\)$"):
        load(file, None, SPLIT)
