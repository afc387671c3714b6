"""The decoder of GPT-2 and GPT-3, read top to bottom: embeddings, blocks, tied head, loss.

Shapes: B batch, T tokens, C width, H heads, D head width, V vocabulary (padded)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.models.attention import KeyValueCache, banded_attention, causal_attention, packed_attention
from megagpt.models.likelihood import token_likelihoods
from megagpt.models.loss import Softmax, linear_cross_entropy, softmax_cross_entropy_
from megagpt.models.packing import Packing
from megagpt.models.presets import ModelConfig


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.dropout = config.dropout
        self.window = config.window if config.is_banded(layer) else None
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: KeyValueCache | Packing | None = None) -> Tensor:
        B, T, C = x.shape
        # Split before the heads are told apart: then the backward pass writes the three gradients side by side, once.
        q, k, v = (y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in self.qkv(x).split(C, dim=2))
        # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if isinstance(cache, Packing):
            y = packed_attention(q, k, v, cache.mask(self.window))
        elif cache is not None:
            mask = cache.mask(T, self.window)
            k, v = cache.append(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.window is not None:
            y = banded_attention(q, k, v, self.window, dropout)
        else:
            y = causal_attention(q, k, v, dropout)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers, 4 C wide inside, with the tanh approximation of GELU that GPT-2 was trained with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32, even if an engine keeps gain and bias in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-LayerNorm residual block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | Packing | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def embed(tokens: Tensor, positions: Tensor, token_table: Tensor, position_table: Tensor, dtype: torch.dtype) -> Tensor:
    """The residual stream's first value (B, T, C): rows of both tables, (V, C) and (T, C), summed in fp32."""
    # On a CPU, zeroing a dense gradient of the whole table costs more than the lookup; a sparse gradient is added to
    # the head's dense one.
    sparse = token_table.device.type == "cpu"
    of_token = F.embedding(tokens, token_table, sparse=sparse)
    return (of_token.float() + F.embedding(positions, position_table).float()).to(dtype)


def _table(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding(rows, width)`, which on a meta device would take the second of importing PyTorch's compiler."""
    return nn.Embedding.from_pretrained(torch.randn(rows, width), freeze=False)


class GPT(nn.Module):
    """The model. Build it on any device, meta included, then fill it with `initialize` or a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = _table(config.padded_vocab_size, config.width)
        self.position_embedding = _table(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = LayerNorm(config.width)
        self.residual_dtype = torch.float32
        """The residual stream is fp32 in every precision by default: each block adds something small to it."""
        self.embed = embed
        self.softmax: Softmax = softmax_cross_entropy_
        """An engine may replace these two by compiled ones."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Loss, logits or log-likelihoods of `tokens`, int (B, T). With `targets`, int (B, T), -100 for "not counted":
        the SUM of the token losses, fp32, in nats. Without: logits (B, T, vocab_size); with a `cache`, logits of the
        last position only, (B, 1, vocab_size). With a `packing` of N places and `targets`, int (N,): those of
        `token_likelihoods`, float64 (2, N); the head runs at these places only."""
        T = tokens.shape[1]
        if packing is not None:
            positions = packing.positions
        else:
            positions = cache.positions(T) if cache is not None else torch.arange(T, device=tokens.device)
        head = self.token_embedding.weight  # tied: (V, C)
        x = self.embed(tokens, positions, head, self.position_embedding.weight, self.residual_dtype)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, cache if packing is None else packing)
        if packing is not None:
            x = x.flatten(0, 1)[packing.places]
        elif cache is not None:
            cache.length += T
            x = x[:, -1:]
        x = self.final_norm(x)
        if targets is None:
            return F.linear(x, head)[..., : self.config.vocab_size]
        if packing is not None:
            return token_likelihoods(x, head, targets, self.config.vocab_size)
        return linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), self.config.vocab_size, self.softmax)
