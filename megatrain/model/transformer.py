"""The decoder of the Llama family: pre-norm, rotary positions, grouped-query attention, SwiGLU.

Design choices:
- It gives losses of single tokens, never their mean: law 3's division belongs to whoever knows the global batch.
- No buffers, and nothing is drawn: it can be built on the meta device and filled by any engine.
- A stage of a pipeline is the same class with fewer layers, and without the embedding or the head; a tensor-parallel
  rank's is the same with fewer heads and rows.
- Nothing is read back from the device.

B is the number of samples, S the sequence length, tp the tensor-parallel ranks, D the head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain import device
from megatrain.batch import IGNORE, mask_end
from megatrain.config import AttentionKernel, Kernel, KernelsConfig, LossKernel, ModelConfig
from megatrain.kernels.attention import flash, packed, sdpa
from megatrain.kernels.attention.op import intervals
from megatrain.kernels.linear_cross_entropy.op import linear_cross_entropy, losses
from megatrain.kernels.rotary.op import rotate_
from megatrain.kernels.swiglu import op, reference
from megatrain.model.choice import TORCH
from megatrain.model.modules import ColumnLinear, Embedding, RMSNorm, RowLinear, linear, make_norm
from megatrain.model.partition import Stage, parts, whole
from megatrain.model.rotary import cos_sin, rotate
from megatrain.model.spec import attention_out_bias, head_dim
from megatrain.parallel.tensor import (
    ALONE,
    TensorParallel,
    cross_entropy,
    gather_sequence,
    vocabulary_range,
    whole_vocabulary,
)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) over this rank's heads."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel, kernels: KernelsConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.head_dim = head_dim(config)
        heads = config.num_heads // tensor.size
        kv_heads = max(1, config.num_kv_heads // tensor.size)
        self.group = heads // kv_heads
        self.qkv = ColumnLinear(
            config.hidden_size,
            (heads + 2 * kv_heads) * self.head_dim,
            config.attention_bias,
            tensor,
            shared_from=heads * self.head_dim if tensor.kv_group is not None else None,
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_dim, config.norm_eps, tensor, kernels.norm)
            self.key_norm = RMSNorm(self.head_dim, config.norm_eps, tensor, kernels.norm)
        self.qk_norm = config.qk_norm
        self.out = RowLinear(heads * self.head_dim, config.hidden_size, attention_out_bias(config), tensor)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: packed.Mask) -> Tensor:
        """[B, S / tp, hidden_size] from the same; cos and sin as rotary.cos_sin gives them."""
        qkv = self.qkv(x)
        in_place = self.kernels.rotary is Kernel.triton and not self.qk_norm
        if in_place:
            qkv = rotate_(qkv, cos, sin, group=self.group + 2, rotated=self.group + 1)
        heads = qkv.unflatten(-1, (-1, self.group + 2, self.head_dim))
        q, k, v = heads.split((self.group, 1, 1), dim=-2)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if not in_place:
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        y = packed.attention(q, k.squeeze(-2), v.squeeze(-2), mask)
        output: Tensor = self.out(y.flatten(2))
        return output

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of [B, S, key-value heads, heads of each, head_dim]."""
        if self.kernels.rotary is Kernel.triton:
            return rotate_(x.flatten(2), cos, sin).view_as(x)
        return rotate(x, cos[..., None, :], sin[..., None, :])


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020) over this rank's share of the intermediate size."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel, kernel: Kernel) -> None:
        super().__init__()
        intermediate = config.intermediate_size // tensor.size
        self.gate_up = ColumnLinear(config.hidden_size, 2 * intermediate, config.mlp_bias, tensor)
        product = (op if kernel is Kernel.triton else reference).swiglu_linear
        self.down = RowLinear(intermediate, config.hidden_size, config.mlp_bias, tensor, product)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S / tp, hidden_size] from the same."""
        output: Tensor = self.down(self.gate_up(x))
        return output


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream after its norm.

    recompute: the backward pass computes them again from the layer's input (Chen et al. 2016).
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel, kernels: KernelsConfig, recompute: bool) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, tensor, kernels.norm)
        self.attention = Attention(config, tensor, kernels)
        self.mlp_norm = make_norm(config, tensor, kernels.norm)
        self.mlp = MLP(config, tensor, kernels.swiglu)
        self.recompute = recompute

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: packed.Mask) -> Tensor:
        """[B, S / tp, hidden_size] from the same."""
        if self.recompute and torch.is_grad_enabled():
            # Within the layer's forward, so that what an engine hooks to the layer runs once. Nothing is drawn in it.
            output: Tensor = checkpoint(self._compute, x, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            return output
        return self._compute(x, cos, sin, mask)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: packed.Mask) -> Tensor:
        y, x = self.mlp_norm(self.attention(self.attention_norm(x), cos, sin, mask), x)
        output: Tensor = x + self.mlp(y)
        return output


class Head(nn.Module):
    """From the residual stream to logits, or on to losses of tokens. `shared`: the embedding's weight, where tied."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        shared: nn.Parameter | None,
        tensor: TensorParallel,
        kernel: LossKernel,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size)) if shared is None else shared
        self.vocab_size = config.vocab_size
        self.tensor = tensor
        self.kernel = kernel

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Of x [B, S / tp, hidden_size] logits [B, S, rows] in its dtype; with targets int32[B, S] losses [B, S]."""
        x = gather_sequence(x, self.tensor)
        if targets is None:
            return linear(x, self.weight)
        x, targets, shape = x.flatten(0, 1), targets.flatten(), targets.shape
        if self.kernel is LossKernel.torch:
            return cross_entropy(linear(x, self.weight), targets, self.vocab_size, self.tensor).view(shape)
        ids = vocabulary_range(len(self.weight), self.vocab_size, self.tensor)
        triton = self.kernel is LossKernel.triton
        parts = linear_cross_entropy(x, self.weight, targets, ids.start, len(ids), triton)
        return losses(*whole_vocabulary(*parts, self.tensor), targets, IGNORE).view(shape)


class Transformer(nn.Module):
    """A stage of the decoder, or all of it. Its parameters have no values until they are loaded.

    stage: which layers it has, and whether the embedding or the head; by default all. tensor: which part of each.
    recompute: layers keep their input only and compute the rest again in the backward pass. kernels: what computes,
    without auto (model/choice.py).
    parts: what of the whole model's parameters it holds, by their global names, which are its own too.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: Stage | None = None,
        tensor: TensorParallel = ALONE,
        recompute: bool = False,
        kernels: KernelsConfig = TORCH,
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.flash_attention = flash.for_architecture(device.architecture())
        self.stage = stage = stage or whole(config)
        self.parts = parts(config, stage, tensor.rank, tensor.size)
        rows = -(-config.vocab_size // tensor.size)
        if "embedding.weight" in self.parts:
            # In the last stage too, where it is tied: so it has the same name, and the head shares it.
            self.embedding = Embedding(rows, config.hidden_size, tensor)
        # A dictionary, so that a layer is named by its number in the whole model wherever it lies.
        layers = range(stage.start, stage.stop)
        self.layers = nn.ModuleDict({str(i): Layer(config, tensor, kernels, recompute) for i in layers})
        if stage.last:
            self.norm = make_norm(config, tensor, kernels.norm)
            shared = self.embedding.weight if config.tie_embeddings else None
            self.head = Head(config, rows, shared, tensor, kernels.linear_cross_entropy)

    @property
    def shares_embedding(self) -> bool:
        """Whether the first and the last stage hold the same embedding."""
        return self.config.tie_embeddings and self.stage.count > 1

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        start: Tensor,
        end: Tensor | None = None,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Losses of the targets, or logits where there are none; before the last stage, what the next one takes.

        x: the first stage's input_ids, else hidden states [B, S / tp, hidden_size] in the weights' dtype, which is
        what a stage before the last returns. input_ids, positions, start, end, targets: int32[B, S], and documents
        int32[B, C], as in Batch; flash-attn needs documents, nothing else does.
        Returns with targets the loss of each token, [B, S] in fp32 (fp64 where the weights are), 0 where the target
        is IGNORE; without, logits [B, S, vocab_size] in the weights' dtype, of a tensor-parallel rank its columns.
        """
        if self.stage.first:
            x = self.embedding(x)
        cos, sin = cos_sin(self.config, positions, torch.promote_types(x.dtype, torch.float32))
        mask = self._mask(start, end, documents)
        for layer in self.layers.values():
            x = layer(x, cos, sin, mask)
        if not self.stage.last:
            return x
        output: Tensor = self.head(self.norm(x), targets)
        return output

    def _mask(self, start: Tensor, end: Tensor | None, documents: Tensor | None) -> packed.Mask:
        """What attention is computed over, in all layers, as the kernel takes it."""
        if self.kernels.attention is AttentionKernel.flash:
            assert self.flash_attention is not None  # Else model/choice.py refuses it.
            return flash.prepare(self.flash_attention, documents, start.shape[1], self.config.sliding_window)
        prepare = intervals if self.kernels.attention is AttentionKernel.triton else sdpa.prepare
        return prepare(self._window(start), mask_end(start, end), keys=start.shape[1])

    def _window(self, start: Tensor) -> Tensor:
        """`start` moved up to the sliding window: query m sees itself and the window - 1 keys before it."""
        window = self.config.sliding_window
        if window is None:
            return start
        query = torch.arange(start.shape[1], dtype=start.dtype, device=start.device)
        return torch.maximum(start, query - window + 1)
