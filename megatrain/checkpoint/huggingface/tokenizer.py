"""Whether a tokenizer can be a model's: asked wherever the two come together, going out or in."""

from __future__ import annotations

from tokenizers import Tokenizer

from megatrain.config import ModelConfig
from megatrain.errors import InputError
from megatrain.storage import Folder


def check_tokenizer(path: Folder, config: ModelConfig, eos_id: int) -> str:
    """The text of the token that ends documents. Raises InputError where tokenizer.json at `path` can't be the model's:
    more ids than the model has, or no such token.
    """
    tokenizer = Tokenizer.from_buffer(path.read_bytes())
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > config.vocab_size:
        raise InputError(f"{path}: {ids} ids, the model has model.vocab_size={config.vocab_size}")
    eos = tokenizer.id_to_token(eos_id)
    if eos is None:
        raise InputError(f"{path}: has no id {eos_id}, which ends the documents that the model was trained on")
    return eos
