"""`megatrain generate checkpoint=C prompt="..."`: prints the prompt and what the model makes of it, as it comes."""

from __future__ import annotations

import sys
from functools import partial

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from megatrain.command_config import GenerateConfig
from megatrain.config import Precision
from megatrain.errors import DONE, bad_value
from megatrain.evaluate.generate import generate
from megatrain.evaluate.loading import Checkpoint, attempt, load_model, load_tokenizer
from megatrain.model.transformer import Transformer


def run(config: GenerateConfig) -> int:
    """Prints text to standard output; the exit code. An empty prompt begins a document."""
    for key, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(config, key) < least:
            raise bad_value(key, getattr(config, key), f"has to be at least {least}")
    tokenizer, model, eos_id = attempt(config.checkpoint, partial(_load, precision=config.precision))
    prompt = tokenizer.encode(config.prompt, add_special_tokens=False).ids or [eos_id]
    new = generate(model, prompt, config.max_new_tokens, config.temperature, config.top_k, config.seed, eos_id)
    sys.stdout.write(config.prompt)
    # Gives text once it is whole characters: a token of a byte-level vocabulary may end within one.
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    for id_ in new:
        sys.stdout.write(stream.step(tokenizer, id_) or "")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return DONE


def _load(checkpoint: Checkpoint, precision: Precision) -> tuple[Tokenizer, Transformer, int]:
    """Tokenizer, model, and the id that ends a document."""
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    return tokenizer, load_model(checkpoint.reader, checkpoint.model, precision), checkpoint.eos_id
