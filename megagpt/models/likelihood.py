"""Log-likelihoods of given tokens, precise enough to be summed over a thousand of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of one matrix product with the head. 1,024 x 50,304 logits in fp32 take 206 MB.
_PRODUCT_ROWS = {"cpu": 256, "cuda": 1024}
# Rows of one softmax. On a CPU, 16 x 50,304 in fp32 are 3 MB, which stay in cache.
_SOFTMAX_ROWS = {"cpu": 16, "cuda": 1024}


def token_likelihoods(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Of each target, its log-likelihood in nats, and 1 if no token is likelier, else 0: float64 (2, N). hidden (N, C),
    weight (V, C), targets int (N,). Only the first `vocab_size` rows of the weight take part. Products run in the
    autocast dtype if autocast is on; exponentials in fp32.

    The logit, the largest logit and the logarithm are subtracted in float64: in fp32, log_softmax over 50,257 logits
    errs by up to 5e-6 a token on a CPU, always in one direction."""
    device = hidden.device.type
    found = torch.empty(2, len(hidden), dtype=torch.float64, device=hidden.device)
    rows, step = _PRODUCT_ROWS.get(device, 1024), _SOFTMAX_ROWS.get(device, 1024)
    for start in range(0, len(hidden), rows):
        logits = F.linear(hidden[start : start + rows], weight)
        for first in range(0, len(logits), step):
            z = logits[first : first + step, :vocab_size].float()
            part = slice(start + first, start + first + len(z))
            target = targets[part, None]
            best = z.argmax(1, keepdim=True)
            largest, chosen = z.gather(1, best), z.gather(1, target)
            total = (z - largest).exp_().sum(1)
            found[0, part] = (chosen.double() - largest.double())[:, 0] - total.double().log()
            found[1, part] = (best == target)[:, 0].double()
    return found
