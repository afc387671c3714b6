"""The decoder of GPT-2 and GPT-3, read top to bottom: embeddings, blocks, tied head, loss.

Shapes: B batch, T tokens, C width, H heads, D head width, V vocabulary (padded), t tensor ranks. On one rank t is 1;
on several, `tensor_parallel` says who has which part."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.models.attention import KeyValueCache, banded_attention, causal_attention, packed_attention
from megagpt.models.likelihood import token_likelihoods
from megagpt.models.loss import Softmax, linear_cross_entropy, softmax_cross_entropy_
from megagpt.models.packing import Packing
from megagpt.models.presets import ModelConfig
from megagpt.models.tensor_parallel import ALONE, TensorRanks, row_linear
from megagpt.models.tensor_softmax import tensor_softmax


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: ModelConfig, layer: int, ranks: TensorRanks) -> None:
        super().__init__()
        self.layer, self.ranks = layer, ranks
        self.heads = config.heads // ranks.size
        self.dropout = config.dropout
        self.window = config.window if config.is_banded(layer) else None
        self.qkv = nn.Linear(config.width, 3 * config.width // ranks.size)
        self.out = nn.Linear(config.width // ranks.size, config.width)

    def forward(self, x: Tensor, cache: KeyValueCache | Packing | None = None) -> Tensor:
        if cache is None:
            x = self.ranks.all_gather(x)  # (B, T / t, C) -> (B, T, C)
        B, T, _ = x.shape
        # Split before the heads are told apart: then the backward pass writes the three gradients side by side, once.
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        # each (B, H / t, T, D)
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
        return row_linear(self.out, y.transpose(1, 2).reshape(B, T, -1), self.ranks, whole=cache is not None)


class MLP(nn.Module):
    """Two layers, 4 C wide inside, with the tanh approximation of GELU that GPT-2 was trained with."""

    def __init__(self, config: ModelConfig, ranks: TensorRanks) -> None:
        super().__init__()
        self.ranks = ranks
        self.up = nn.Linear(config.width, 4 * config.width // ranks.size)
        self.down = nn.Linear(4 * config.width // ranks.size, config.width)

    def forward(self, x: Tensor, whole: bool = False) -> Tensor:
        if not whole:
            x = self.ranks.all_gather(x)  # (B, T / t, C) -> (B, T, C)
        return row_linear(self.down, F.gelu(self.up(x), approximate="tanh"), self.ranks, whole)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32, even if an engine keeps gain and bias in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """Pre-LayerNorm residual block, of the own tokens (B, T / t, C); with a `cache`, of all (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int, ranks: TensorRanks = ALONE) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(config, layer, ranks)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config, ranks)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | Packing | None = None) -> Tensor:
        dtype = x.dtype  # a residual stream in bf16 stays so behind a sum in fp32
        x = (x + self.dropout(self.attention(self.attention_norm(x), cache))).to(dtype)
        return (x + self.dropout(self.mlp(self.mlp_norm(x), whole=cache is not None))).to(dtype)


def embed(
    tokens: Tensor,
    positions: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    dtype: torch.dtype,
    ranks: TensorRanks = ALONE,
    whole: bool = False,
) -> Tensor:
    """The residual stream's first value (B, T / t, C), or (B, T, C) if `whole`: rows of both tables, (V / t, C) and
    (context, C), summed in fp32. `tokens` and `positions` are those of all T tokens."""
    if ranks.size == 1:
        of_token = _look_up(tokens, token_table)
    else:  # one rank has a token's row, and all others add zeros: exact in any dtype
        row = tokens - ranks.rank * len(token_table)
        here = (row >= 0) & (row < len(token_table))
        part = _look_up(torch.where(here, row, 0), token_table) * here[..., None]
        of_token = ranks.all_reduce(part) if whole else ranks.reduce_scatter(part)
        positions = positions if whole else ranks.own_tokens(positions)
    return (of_token.float() + F.embedding(positions, position_table).float()).to(dtype)


def _look_up(tokens: Tensor, table: Tensor) -> Tensor:
    """On a CPU, zeroing a dense gradient of the whole table costs more than the lookup; a sparse gradient is added to
    the head's dense one."""
    return F.embedding(tokens, table, sparse=table.device.type == "cpu")


def _table(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding(rows, width)`, which on a meta device would take the second of importing PyTorch's compiler."""
    return nn.Embedding.from_pretrained(torch.randn(rows, width), freeze=False)


class GPT(nn.Module):
    """The model, or the part of it that one of several tensor ranks has. Build it on any device, meta included, then
    fill it with `initialize` or a checkpoint."""

    def __init__(self, config: ModelConfig, ranks: TensorRanks = ALONE) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.token_embedding = _table(config.padded_vocab_size // ranks.size, config.width)
        self.position_embedding = _table(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, ranks) for layer in range(config.layers))
        self.final_norm = LayerNorm(config.width)
        self.residual_dtype = torch.float32
        """The residual stream is fp32 in every precision by default: each block adds something small to it."""
        self.embed = embed
        self.softmax: Softmax = tensor_softmax(ranks) if ranks.size > 1 else softmax_cross_entropy_
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
        `token_likelihoods`, float64 (2, N); the head runs at these places only.

        Tensor ranks call it together, with the same arguments, and all of them get the result. T must be a multiple of
        t, but not with a `cache`: then each rank computes LayerNorms and residual stream for all tokens, and there is
        no gradient. A `packing` is for a model that is whole on its rank."""
        whole, T, ranks = cache is not None, tokens.shape[1], self.ranks
        assert packing is None or ranks.size == 1
        if packing is not None:
            positions = packing.positions
        else:
            positions = cache.positions(T) if cache is not None else torch.arange(T, device=tokens.device)
        head = self.token_embedding.weight  # tied: (V / t, C)
        x = self.embed(tokens, positions, head, self.position_embedding.weight, self.residual_dtype, ranks, whole)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, cache if packing is None else packing)
        if packing is not None:
            x = x.flatten(0, 1)[packing.places]
        elif cache is not None:
            cache.length += T
            x = x[:, -1:]
        x = self.final_norm(x)
        if not whole:
            x = ranks.all_gather(x)  # (B, T / t, C) -> (B, T, C)
        if targets is None:
            return ranks.all_gather_columns(F.linear(x, head))[..., : self.config.vocab_size]
        if packing is not None:
            return token_likelihoods(x, head, targets, self.config.vocab_size)
        return linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), self.config.vocab_size, self.softmax)
