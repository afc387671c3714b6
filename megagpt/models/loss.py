"""Output head and cross-entropy in one, without ever holding the logits of all tokens.

Tokens x 50,304 logits are the largest tensor of a small GPT. Here a chunk of tokens goes through head, softmax and
both backward products before the next chunk starts, so the peak is one chunk, whatever the number of tokens.
"""

from typing import Any

import torch
from torch import Tensor

# Tokens whose logits exist at a time. Large enough that the products run at full rate and that adding the chunk's
# share to the weight's gradient is cheap beside them.
CHUNK = 1024
# Rows of a chunk whose softmax is taken at a time on a CPU: 16 x 50,304 in fp32 are 3 MB, which stay in cache.
_CPU_ROWS = 16
_CPU_GRADIENT_ROWS = 1024
# Targets that do not count.
IGNORE = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats, as an fp32 scalar.

    hidden (N, C), weight (V, C), targets (N,) with -100 where a token does not count. Only the first `vocab_size`
    columns take part: the dead rows of a padded table get probability and gradient zero. Products run in the
    autocast dtype where autocast is on, softmax and sums in fp32.
    """
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
        # Made once and used by every chunk: on a CPU, fresh memory of this size costs as much as the product in it.
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
        # The loss is one scalar, so its gradients are those of the forward pass times the scalar that arrives. They
        # are scaled in place, which a second backward pass through the same graph must not do again.
        if getattr(ctx, "spent", False):
            raise RuntimeError("linear_cross_entropy: backward through the same loss twice")
        ctx.spent = True
        (scale,) = grad_output
        hidden, weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if hidden is None else hidden.mul_(scale).to(hidden_dtype),
            None if weight is None else weight.mul_(scale).to(weight_dtype),
            None,
            None,
            None,
        )


def _accumulate_product_(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None, first: bool) -> None:
    """total = a @ b, or total += a @ b; `product` is scratch of the same shape where a and b are not fp32."""
    if product is None:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
        return
    torch.mm(a, b, out=product)
    # On a CPU a mixed-precision sum goes through an fp32 copy of its whole operand: keep that copy in cache.
    step = _CPU_GRADIENT_ROWS if total.device.type == "cpu" else len(total)
    for rows, share in zip(total.split(step), product.split(step), strict=True):
        if first:
            rows.copy_(share)
        else:
            rows.add_(share)


def softmax_cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Sum of the token losses, and its gradient with respect to the logits, which overwrites them.

    logits (N, V), targets (N,). The loss is max - log p(max) - logit(target): unlike -log p(target) it stays finite
    however small the target's probability.
    """
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
