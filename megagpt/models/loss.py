"""Output head and cross-entropy in one, without the logits of all tokens in memory.

Tokens x 50,304 logits are the largest tensor of a small GPT. Here a chunk of tokens goes through head, softmax and
both backward products before the next chunk starts, so the peak is one chunk for any number of tokens."""

from typing import Any

import torch
from torch import Tensor

# Tokens whose logits exist at a time: enough that the products run at full rate, and that adding the chunk's share to
# the weight's gradient is cheap in comparison.
CHUNK = 1024
# Rows of a chunk in one softmax on a CPU: 16 x 50,304 in fp32 are 3 MB, which stay in cache.
_CPU_ROWS = 16
# Rows of the weight's gradient in one sum on a CPU, for the same reason.
_CPU_GRADIENT_ROWS = 1024
# Value of targets that do not count.
IGNORE = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats, as an fp32 scalar. hidden (N, C),
    weight (V, C), targets (N,), -100 for tokens that do not count. Only the first `vocab_size` columns take part: the
    padding rows of the table get probability and gradient zero. Products run in the autocast dtype if autocast is on;
    softmax and sums in fp32."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # so that no gradient is computed
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        # Allocated once for all chunks: on a CPU, new memory of this size costs as much as the product written to it.
        buffer = h.new_empty(min(CHUNK, len(h)), len(w))
        product = torch.empty_like(w) if need_weight and dtype != torch.float32 else None
        grad_hidden = torch.empty_like(h) if need_hidden else None
        grad_weight = torch.empty_like(w, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), CHUNK):
                x = h[start : start + CHUNK]
                logits = torch.mm(x, w.T, out=buffer[: len(x)])  # (chunk, V)
                chunk_loss, grad_logits = softmax_cross_entropy_(logits, targets[start : start + CHUNK], vocab_size)
                loss += chunk_loss
                if grad_hidden is not None:
                    torch.mm(grad_logits, w, out=grad_hidden[start : start + CHUNK])
                if grad_weight is not None:
                    _accumulate_product_(grad_weight, grad_logits.T, x, product, first=start == 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # The loss is one scalar, so the gradients are those of the forward pass times the incoming scalar. They are
        # scaled in place, so a second backward pass would scale them twice.
        if getattr(ctx, "spent", False):
            raise RuntimeError("linear_cross_entropy: backward through the same loss twice")
        ctx.spent = True
        (scale,) = grad_output
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (None if g is None else g.mul_(scale).to(dtype) for g, dtype in gradients)
        return *scaled, None, None, None


def _accumulate_product_(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None, first: bool) -> None:
    """total = a @ b if `first`, else total += a @ b; `product` is scratch of that shape, None if a and b are fp32."""
    if product is None:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
        return
    torch.mm(a, b, out=product)
    # On a CPU, a mixed-precision sum copies its whole operand to fp32; small steps keep the copy in cache.
    step = _CPU_GRADIENT_ROWS if total.device.type == "cpu" else len(total)
    for rows, share in zip(total.split(step), product.split(step), strict=True):
        if first:
            rows.copy_(share)
        else:
            rows.add_(share)


def softmax_cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Sum of the token losses, and its gradient with respect to the logits, which overwrites them. logits (N, V),
    targets (N,). The loss is max - log p(max) - logit(target), which stays finite even if the target's probability
    underflows, unlike -log p(target)."""
    logits[:, vocab_size:] = -torch.inf
    counted = (targets != IGNORE)[:, None]
    target = torch.where(counted, targets[:, None], 0)
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = _CPU_ROWS if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z, t, c = logits[rows], target[rows], counted[rows]
        p = torch.softmax(z, dim=1, dtype=torch.float32)
        token_loss = z.amax(1, keepdim=True).float() - p.amax(1, keepdim=True).log() - z.gather(1, t).float()
        loss += torch.where(c, token_loss, 0.0).sum()
        p.scatter_add_(1, t, p.new_full(t.shape, -1.0))
        z.copy_(p.mul_(c))
    return loss, logits
