"""The reference: GPT-2 as it is usually written, and the usual training step, with all that its users have: flash
attention, autocast, PyTorch's loss scaler for fp16, a compiler. Nothing is chunked or sharded."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from megagpt.models.presets import ModelConfig


def plain_optimizer(model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> AdamW:
    """PyTorch's AdamW. Matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr, betas, eps)


def plain_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all logits. `tokens`, `targets`: int64 (batch, context). If this function is compiled,
    model, head and softmax are in one graph."""
    output = model(tokens)
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_step(
    model: nn.Module,
    optimizer: Optimizer,
    tokens: Tensor,
    targets: Tensor,
    clip_norm: float,
    dtype: torch.dtype = torch.float32,
    clip: Callable[[Iterable[Tensor], float], Tensor] = nn.utils.clip_grad_norm_,
    micro_batches: int = 1,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = plain_loss,
    scaler: GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss, and norm of the gradient before clipping, of one step over the whole batch: forward and backward pass of
    each of the equal micro-batches, clipping, update. `tokens`, `targets`: int64 (batch, context); `dtype`: autocast's;
    `loss_of`: `plain_loss`, perhaps compiled; `scaler`: the loss scale of fp16, None for the other precisions."""
    scaler = scaler or GradScaler(tokens.device.type, enabled=False)
    total = torch.zeros((), device=tokens.device)
    for inputs, wanted in zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, inputs, wanted) / micro_batches
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = clip(model.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


class PlainGPT(nn.Module):
    """GPT-2 with PyTorch's own initialization."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.width
        self.heads = config.heads
        self.wte = nn.Embedding(config.padded_vocab_size, c)
        self.wpe = nn.Embedding(config.context, c)
        self.layers = nn.ModuleList(
            nn.ModuleList([
                nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c),
                nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c),
            ])
            for _ in range(config.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(c)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        x = self.wte(tokens) + self.wpe.weight[:T]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            norm_1, qkv, out, norm_2, up, down = layer
            q, k, v = qkv(norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(B, T, -1))
            x = x + down(F.gelu(up(norm_2(x)), approximate="tanh"))
        return F.linear(self.norm(x), self.wte.weight)
