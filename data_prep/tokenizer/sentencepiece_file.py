"""SentencePiece models (Kudo and Richardson 2018): BPE and unigram, as a tokenizer.json.

Design choices:
- The set holds a tokenizer.json, which everything after it goes by, so that has to be the whole truth: a model is
  converted, and refused where its ids aren't those of SentencePiece itself (`differing`).
- SentencePiece's BPE merges whatever two neighbours together are a piece, the best score first: byte_level.merges.
- Text is split into words first where that can't change anything, which is where no piece goes on after a space.
- A symbol that the user defined is found in text, as SentencePiece does; but not where a space is put before the text,
  for tokenizers would put one after each symbol too: there it stays text.
- A control symbol, `<s>`, is no text, but the unigram model of tokenizers would find it there: so its score is one that
  no path through a text takes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from megatrain.data_prep.tokenizer.byte_level import added_token, as_json, merges
from megatrain.errors import InputError

SPACE = "▁"
"""What SentencePiece writes for a space."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces, as sentencepiece_model.proto numbers them."""
UNIGRAM, BPE = 1, 2
"""Kinds of models, likewise."""
OUT_OF_REACH = 10_000.0
"""How far below all others the score of a piece is that isn't for text."""
PROBES = (
    "a  b\tc\r\n\n d ",
    " leading",
    "</s><s><unk><0x41>",
    "中文。日本語「」한국어 हिन्दी ﬁ Å ½ 👩‍🚀\u200b\x00\x7f",
    " ",
    "",
)
"""Texts that conversions go wrong on first."""


def convert(data: bytes) -> tuple[bytes, str | None]:
    """The tokenizer.json of a model, and its EOS if it has one. Raises ValueError for what can't be converted."""
    proto = _parse(data)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    kinds = [piece.type for piece in proto.pieces]
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise ValueError("only BPE and unigram models with spaces before words can be converted")
    if UNUSED in kinds:
        raise ValueError("it has unused pieces")
    names = [piece.piece for piece in proto.pieces]
    words = not any(SPACE in name[1:] for name, kind in zip(names, kinds, strict=True) if kind == NORMAL)
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True}
    added = [
        added_token(name, number, special=kind != USER_DEFINED or rules.add_dummy_prefix)
        for number, (name, kind) in enumerate(zip(names, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    steps: list[dict[str, Any]] = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if rules.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    whole = as_json(
        added_tokens=added,
        normalizer={"type": "Sequence", "normalizers": _normalizers(rules)},
        pre_tokenizer=metaspace if words else None,
        decoder={"type": "Sequence", "decoders": steps},
        model=_unigram(proto) if trainer.model_type == UNIGRAM else _bpe(proto),
    )
    return whole, trainer.eos_piece if trainer.eos_id >= 0 else None


def differing(data: bytes, tokenizer: Any, texts: Sequence[str]) -> int:
    """How many of `texts` and PROBES have other ids from tokenizers.Tokenizer `tokenizer` than from the model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=data)
    compared = [*texts, *PROBES]
    converted = tokenizer.encode_batch_fast(compared, add_special_tokens=False)
    return sum(model.encode(text) != found.ids for text, found in zip(compared, converted, strict=True))


def _parse(data: bytes) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise InputError("tokenizer.path: a SentencePiece model; pip install 'megatrain[prep]'") from None
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ValueError("not a SentencePiece model") from None
    if not proto.pieces:
        raise ValueError("not a SentencePiece model")
    return proto


def _normalizers(rules: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        found += [_replace({"Regex": rf"\A +|[ {SPACE}]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if rules.add_dummy_prefix:
        found.append({"type": "Prepend", "prepend": SPACE})
    return [*found, _replace({"String": " "}, SPACE)]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _bpe(proto: Any) -> dict[str, Any]:
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = sorted((piece for piece in proto.pieces if piece.type == NORMAL), key=lambda piece: -piece.score)
    order = {piece.piece: place for place, piece in enumerate(normal)}
    return {
        "type": "BPE",
        "vocab": ids,
        "merges": list(merges(order)),
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _unigram(proto: Any) -> dict[str, Any]:
    least = min(piece.score for piece in proto.pieces)
    vocabulary = [
        (piece.piece, piece.score if piece.type in (NORMAL, USER_DEFINED) else least - OUT_OF_REACH)
        for piece in proto.pieces
    ]
    unknown = next(number for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    return {"type": "Unigram", "vocab": vocabulary, "unk_id": unknown, "byte_fallback": fallback}
