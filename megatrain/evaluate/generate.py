"""Text from a model, token by token.

Design choices:
- The whole prefix is computed for each token: there is no second way through the model, with a cache of keys and
  values, that could differ from the one that was trained. At the lengths one looks at here a GPU spends the time on
  reading the weights either way; serving belongs to an inference server, on the exported folder.
- Sampling happens on the CPU in fp64, from a generator of its own: a seed means the same text on any device, as far as
  the logits agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatrain.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    eos_id: int,
) -> Iterator[int]:
    """Yields ids after `prompt` (at least one id): at most max_new_tokens, ending before eos_id.

    temperature: 0 takes the likeliest. top_k: samples among so many likeliest; 0: among all.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(prompt)], dtype=torch.int32, device=model.embedding.weight.device)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            positions = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)[None]
            logits = model(ids, positions, torch.zeros_like(ids), documents=torch.zeros_like(ids[:, :1]))[0, -1]
        token = sample(logits.double().cpu(), temperature, top_k, generator)
        if token == eos_id:
            return
        yield token
        ids = torch.cat((ids, ids.new_tensor([[token]])), dim=1)


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One id from logits float64[vocab_size], on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k or len(logits), len(logits)))
    return int(ids[torch.multinomial((values / temperature).softmax(0), 1, generator=generator)])
