"""Text to ids: training a tokenizer, reading one of any usual format, encoding by it."""

from megatrain.data_prep.tokenizer.backends import TIKTOKEN, TOKENIZERS, Encoder, pick_backend
from megatrain.data_prep.tokenizer.training import train
from megatrain.data_prep.tokenizer.vocabulary import EOS, Vocabulary, load

__all__ = ["EOS", "TIKTOKEN", "TOKENIZERS", "Encoder", "Vocabulary", "load", "pick_backend", "train"]
