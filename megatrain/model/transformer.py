"""The decoder of the Llama family: pre-norm, rotary positions, grouped-query attention, SwiGLU.

Design choices:
- It gives losses of single tokens, never their mean: law 3's division belongs to whoever knows the global batch.
- No buffers, and nothing is drawn: it can be built on the meta device and filled by any engine.
- The number of heads is read from the projections' output, so a rank that holds a share of the rows runs the same code.
- Nothing is read back from the device.

B is the number of samples, S the sequence length, D the head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.batch import IGNORE, mask_end
from megatrain.config import ModelConfig
from megatrain.kernels.attention import op
from megatrain.model.modules import ColumnLinear, Embedding, RMSNorm, RowLinear, at_least_fp32, linear, make_norm
from megatrain.model.rotary import cos_sin, rotate
from megatrain.model.spec import head_dim, qkv_size


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = head_dim(config)
        self.group = config.num_heads // config.num_kv_heads
        self.qkv = ColumnLinear(config.hidden_size, qkv_size(config), config.attention_bias)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.out = RowLinear(config.num_heads * self.head_dim, config.hidden_size, config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: op.Mask) -> Tensor:
        """[B, S, hidden_size] from the same; cos and sin as rotary.cos_sin gives them."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.group + 2, self.head_dim))
        query, key, value = qkv.split((self.group, 1, 1), dim=-2)
        q = rotate(self.query_norm(query.flatten(2, 3)), cos, sin)
        k = rotate(self.key_norm(key.flatten(2, 3)), cos, sin)
        y = op.attention(q.transpose(1, 2), k.transpose(1, 2), value.flatten(2, 3).transpose(1, 2), mask)
        output: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.down = RowLinear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden_size] from the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        output: Tensor = self.down(F.silu(gate) * up)
        return output


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream after its norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: op.Mask) -> Tensor:
        """[B, S, hidden_size] from the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class Head(nn.Module):
    """From the residual stream to logits, or on to losses of tokens. `shared`: the embedding's weight, where tied."""

    def __init__(self, config: ModelConfig, shared: nn.Parameter | None) -> None:
        super().__init__()
        if shared is None:
            shared = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.weight = shared

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [B, S, vocab_size] in x's dtype; with targets int32[B, S] losses as Transformer.forward has them."""
        logits = linear(x, self.weight)
        if targets is None:
            return logits
        losses = F.cross_entropy(
            at_least_fp32(logits).flatten(0, 1), targets.flatten().long(), ignore_index=IGNORE, reduction="none"
        )
        return losses.view_as(targets)


class Transformer(nn.Module):
    """The whole decoder. Its parameters are those of spec.parameters(config), without values until they are loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        # A dictionary, so that a layer is named by its number in the whole model wherever it lies.
        self.layers = nn.ModuleDict({str(i): Layer(config) for i in range(config.num_layers)})
        self.norm = make_norm(config)
        self.head = Head(config, self.embedding.weight if config.tie_embeddings else None)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        start: Tensor,
        end: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Losses of the targets, or logits where there are none.

        input_ids, positions, start, end, targets: int32[B, S] as in megatrain.batch.Batch.
        Returns with targets the loss of each token, [B, S] in fp32 (fp64 where the weights are), 0 where the target
        is IGNORE; without, logits [B, S, vocab_size] in the weights' dtype.
        """
        x = self.embedding(input_ids)
        cos, sin = cos_sin(self.config, positions, torch.promote_types(x.dtype, torch.float32))
        mask = op.prepare(self._window(start), mask_end(start, end), keys=input_ids.shape[1])
        for layer in self.layers.values():
            x = layer(x, cos, sin, mask)
        output: Tensor = self.head(self.norm(x), targets)
        return output

    def _window(self, start: Tensor) -> Tensor:
        """`start` moved up to the sliding window: query m sees itself and the window - 1 keys before it."""
        window = self.config.sliding_window
        if window is None:
            return start
        query = torch.arange(start.shape[1], dtype=start.dtype, device=start.device)
        return torch.maximum(start, query - window + 1)
