"""Output head and cross-entropy in one, without the logits of all tokens in memory.

Tokens x 50,304 logits are the largest tensor of a small GPT. Here a chunk of tokens goes through head, softmax and
both backward products before the next chunk starts, so the peak is one chunk for any number of tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagpt.models.chunks import CHUNK, SOFTMAX_ROWS, chunk_rows

# Rows of the weight's gradient in one sum on a CPU: few enough to stay in cache.
_CPU_GRADIENT_ROWS = 1024
# Value of targets that do not count.
IGNORE = -100

Softmax = Callable[[Tensor, Tensor, int, bool], Tensor]
"""(logits (N, V), targets (N,), vocab_size, with_gradient) -> sum of the token losses, an fp32 scalar. If
`with_gradient`, the gradient overwrites the logits."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softmax: Softmax | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats, as an fp32 scalar. hidden (N, C),
    weight (V, C), targets (N,), -100 for tokens that do not count. Only the first `vocab_size` columns take part: the
    padding rows of the table get probability and gradient zero. Products run in the autocast dtype if autocast is on;
    softmax and sums in fp32. `softmax`: that of a chunk, `softmax_cross_entropy_` if None. With `tensor_softmax`, the
    weight has this rank's rows only, (V / t, C); the loss is that of all ranks, and hidden's gradient this rank's part
    of a sum."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # so that no gradient is computed
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype, softmax or softmax_cross_entropy_)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        softmax: Softmax,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden.dtype, weight.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        rows = chunk_rows(len(h), CHUNK[h.device.type])
        # Allocated once for all chunks: on a CPU, new memory of this size costs as much as the product written to it.
        buffer = h.new_empty(rows, len(w))
        scratch = torch.empty_like(w) if need_weight and not _sums_in_fp32(w) else None
        grad_hidden = torch.empty_like(h) if need_hidden else None
        grad_weight = torch.empty_like(w, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), rows):
                x = h[start : start + rows]
                logits = _product(x, w.T, buffer[: len(x)])  # (chunk, V)
                loss += softmax(logits, targets[start : start + rows], vocab_size, need_hidden or need_weight)
                # From here on `logits` are their own gradient.
                if grad_hidden is not None:
                    _product(logits, w, grad_hidden[start : start + rows])
                if grad_weight is not None:
                    _add_product_(grad_weight, logits.T, x, scratch, first=start == 0)
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
        return *scaled, None, None, None, None


def _sums_in_fp32(weight: Tensor) -> bool:
    """Whether a product of such matrices can be added to an fp32 matrix as it is computed: always if they are fp32, and
    in half precision on NVIDIA's GPUs."""
    return weight.dtype == torch.float32 or (weight.is_cuda and torch.version.hip is None)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, with fp32 sums. On x86 without AVX-512, PyTorch's half-precision products of these layouts take ten
    times as long as fp32 ones of the same numbers, rounded afterwards."""
    if a.is_cpu and a.dtype != torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return out.copy_(torch.mm(a.float(), b.float()))
    return torch.mm(a, b, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, scratch: Tensor | None, first: bool) -> None:
    """total = a @ b if `first`, else total += a @ b. `total` is fp32; `scratch`, of its shape and the dtype of a and b,
    takes the product if it cannot be added as it is computed."""
    if scratch is None:
        wider: dict[str, Any] = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
        if first:
            torch.mm(a, b, **wider, out=total)
        else:
            torch.addmm(total, a, b, **wider, out=total)
        return
    torch.mm(a, b, out=scratch)
    # On a CPU, a mixed-precision sum copies its whole operand to fp32; small steps keep the copy in cache.
    step = _CPU_GRADIENT_ROWS if total.device.type == "cpu" else len(total)
    for rows, share in zip(total.split(step), scratch.split(step), strict=True):
        if first:
            rows.copy_(share)
        else:
            rows.add_(share)


def softmax_cross_entropy_(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool) -> Tensor:
    """A `Softmax`, operator by operator. The loss is max - log p(max) - logit(target), which stays finite even if the
    target's probability underflows, unlike -log p(target)."""
    logits[:, vocab_size:] = -torch.inf
    counted = (targets != IGNORE)[:, None]
    target = torch.where(counted, targets[:, None], 0)
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = SOFTMAX_ROWS.get(logits.device.type, len(logits))
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z, t, c = logits[rows], target[rows], counted[rows]
        p = torch.softmax(z, dim=1, dtype=torch.float32)
        token_loss = z.amax(1, keepdim=True).float() - p.amax(1, keepdim=True).log() - z.gather(1, t).float()
        loss += torch.where(c, token_loss, 0.0).sum()
        if with_gradient:
            p.scatter_add_(1, t, p.new_full(t.shape, -1.0))
            z.copy_(p.mul_(c))
    return loss


def softmax_cross_entropy_to_compile_(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool) -> Tensor:
    """A `Softmax` written for torch.compile, which reads the logits twice, for the sum and for the gradient, writes the
    gradient once, and puts nothing in fp32 into memory."""
    column = torch.arange(logits.shape[1], device=logits.device)
    counted = (targets != IGNORE)[:, None]
    target = torch.where(counted, targets[:, None], 0)
    z = logits.float().masked_fill(column >= vocab_size, -torch.inf)
    largest = z.amax(1, keepdim=True)
    log_total = (z - largest).exp().sum(1, keepdim=True).log()
    # Not by a gather: PyTorch 2.11 compiles it to run after the gradient has overwritten the logits.
    of_target = torch.where(column == target, z, 0.0).sum(1, keepdim=True)
    token_loss = log_total + (largest - of_target)
    loss = torch.where(counted, token_loss, 0.0).sum()
    if with_gradient:  # computes the exponentials again: to keep them would cost more than to read the logits twice
        p = (z - largest - log_total).exp()
        logits.copy_((p - (column == target).float()) * counted)
    return loss
