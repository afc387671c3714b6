"""Softmax and cross-entropy of a head whose vocabulary is cut over tensor ranks. Each rank has the logits of its own
rows of the table, and three numbers a token travel: the largest of them, the sum of their exponentials relative to it,
and the target's logit, which one rank has."""

import torch
from torch import Tensor

from megagpt.models.chunks import SOFTMAX_ROWS
from megagpt.models.loss import IGNORE, Softmax
from megagpt.models.tensor_parallel import TensorRanks


def tensor_softmax(ranks: TensorRanks) -> Softmax:
    """The `Softmax` of this rank's logits, (N, V / t): the loss is that of all ranks, the same bits on each of them.
    Every rank calls it with the same targets."""

    def softmax(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool) -> Tensor:
        first = ranks.rank * logits.shape[1]
        number = torch.arange(logits.shape[1], device=logits.device)
        dead = number >= vocab_size - first  # padding rows of the table: on the last ranks, perhaps all
        counted = targets != IGNORE
        here = counted & (targets >= first) & (targets < first + logits.shape[1])
        column = torch.where(here, targets - first, -1)[:, None]
        # Compiled code keeps nothing in fp32; operators one by one do, so they take a few rows at a time.
        step = len(logits) if torch.compiler.is_compiling() else SOFTMAX_ROWS.get(logits.device.type, len(logits))
        parts = [slice(start, start + step) for start in range(0, len(logits), step)]

        def scores(rows: slice) -> Tensor:
            return logits[rows].float().masked_fill(dead, -torch.inf)

        own = []
        for rows in parts:
            z = scores(rows)
            # Finite, even if this rank has only padding rows.
            largest = z.amax(1).clamp_min(torch.finfo(torch.float32).min)
            own.append(torch.stack([largest, (z - largest[:, None]).exp().sum(1)]))
        of_target = torch.where(here, logits.gather(1, column.clamp_min(0))[:, 0].float(), 0.0)
        numbers = torch.cat([torch.cat(own, 1), of_target[None]])  # (3, N)
        largest, total, of_target = ranks.all_gather_stacked(numbers).unbind(1)  # (t, N)
        most = largest.amax(0)
        log_total = (total * (largest - most).exp()).sum(0).log()
        loss = torch.where(counted, most - of_target.sum(0) + log_total, 0.0).sum()
        if with_gradient:
            for rows in parts:
                p = (scores(rows) - (most + log_total)[rows, None]).exp()
                logits[rows] = ((p - (number == column[rows]).float()) * counted[rows, None]).to(logits.dtype)
        return loss

    return softmax
