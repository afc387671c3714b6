"""Log-likelihoods of token sequences under a model, the same bits on any number of ranks.

Batches are a function of the sequences alone; whole batches are dealt to the ranks; each sequence's numbers come from
one rank, and its tokens are summed in float64 in their order."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.errors import NonFiniteError
from megagpt.evaluation.results import Score, Scores
from megagpt.evaluation.sequences import Group, Pack, batches, pack
from megagpt.models.packing import Packing
from megagpt.world import World

Model = Callable[..., Tensor]
"""Called as `GPT.forward` with a packing."""
# Tokens of a batch, with padding. On a CPU, a forward pass that leaves the cache is slower: 512 to 1,024 are best, and
# 2,048 cost 6%. A GPU wants more; 16,384 take 1.3 GB at width 5,120.
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


class Progress:
    """Called by `score` after each round of forward passes; this one shows nothing and never interrupts."""

    def interrupted(self) -> bool:
        """Whether to end early; the same answer on every rank."""
        return False

    def done(self, share: float) -> None:
        """`share` of this call's work is done; 1: all."""


def score(
    model: Model, groups: Sequence[Group], world: World, batch_tokens: int = 0, progress: Progress | None = None
) -> Scores | None:
    """The score of each sequence of each group, on every rank; None if `progress` interrupted it. Every rank calls it
    with the same groups, and the model equally often. `batch_tokens`: tokens of a batch; 0: BATCH_TOKENS. Raises
    NonFiniteError, on every rank, if a log-likelihood is not finite."""
    progress = progress or Progress()
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    packs = [p for group, number in zip(groups, offsets, strict=False) for p in pack(group, number)]
    todo = batches(packs, batch_tokens or BATCH_TOKENS[world.device.type])
    # Of each sequence: the sum, and the number of tokens that greedy decoding would not write.
    found = torch.zeros(2, offsets[-1], dtype=torch.float64)
    finished = 0
    for start in range(0, len(todo), world.size):
        if progress.interrupted():
            return None
        mine = start + world.rank
        # A rank without a batch repeats the last one, so that sharded weights are gathered in step.
        batch = [packs[i] for i in todo[min(mine, len(todo) - 1)]]
        values = _score_batch(model, batch, world.device)
        if mine < len(todo):
            _add(found, batch, values)
        finished += sum(map(len, todo[start : start + world.size]))
        progress.done(finished / len(packs))
    if world.size > 1:
        everywhere = found.to(world.device)
        dist.all_reduce(everywhere)  # one rank's values and zeros of the others: exact
        found = everywhere.cpu()
    if not bool(torch.isfinite(found).all()):
        way = "the weights are too large or corrupt, so take an older checkpoint"
        raise NonFiniteError(f"a log-likelihood is NaN or infinite; {way}")
    sums, wrong = found.tolist()
    lengths = [len(tokens.ids) - tokens.first for group in groups for tokens in group]
    flat = [Score(a, n, not b) for a, n, b in zip(sums, lengths, wrong, strict=True)]
    return [flat[a:b] for a, b in itertools.pairwise(offsets)]


def _add(found: Tensor, batch: Sequence[Pack], values: Tensor) -> None:
    likelihoods, greedy = values.tolist()
    numbers = [number for p in batch for _, _, number in p.scored]
    sums: dict[int, float] = {}
    wrong: dict[int, int] = {}
    for number, value, good in zip(numbers, likelihoods, greedy, strict=True):
        sums[number] = sums.get(number, 0.0) + value
        wrong[number] = wrong.get(number, 0) + (not good)
    for number in sums:
        found[0, number], found[1, number] = sums[number], wrong[number]


def _score_batch(model: Model, batch: Sequence[Pack], device: torch.device) -> Tensor:
    """`token_likelihoods` of the packs' scored tokens, in order, on the CPU."""
    longest = max(len(p.ids) for p in batch)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows]).to(device)

    def flat(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    places = flat([b * longest + at for b, p in enumerate(batch) for at, _, _ in p.scored])
    targets = flat([target for p in batch for _, target, _ in p.scored])
    # Padding sees itself: a row of the softmax without any key would be NaN.
    packing = Packing(padded([p.positions for p in batch], 0), padded([p.segments for p in batch], -1), places)
    return model(padded([p.ids for p in batch], 0), targets, packing=packing).cpu()
