"""`megatrain generate checkpoint=C prompt="..."`: prints the prompt and what the model makes of it, as it comes."""

from __future__ import annotations

import sys

from tokenizers.decoders import DecodeStream

from megatrain.config import GenerateConfig
from megatrain.errors import DONE, bad_value
from megatrain.evaluate.generate import generate
from megatrain.evaluate.loading import load_model, load_tokenizer, open_checkpoint


def run(config: GenerateConfig) -> int:
    """Prints text to standard output; the exit code. An empty prompt begins a document."""
    for key, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(config, key) < least:
            raise bad_value(key, getattr(config, key), f"has to be at least {least}")
    checkpoint = open_checkpoint(config.checkpoint)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    model = load_model(checkpoint.reader, checkpoint.model, config.precision)
    prompt = tokenizer.encode(config.prompt, add_special_tokens=False).ids or [checkpoint.eos_id]
    new = generate(
        model, prompt, config.max_new_tokens, config.temperature, config.top_k, config.seed, checkpoint.eos_id
    )
    sys.stdout.write(config.prompt)
    # Gives text once it is whole characters: a token of a byte-level vocabulary may end within one.
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    for id_ in new:
        sys.stdout.write(stream.step(tokenizer, id_) or "")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return DONE
