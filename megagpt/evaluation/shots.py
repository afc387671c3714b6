"""Few-shot prompts: solved examples in front of a row, drawn by seed, the same for any number of ranks."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from megagpt.errors import UserError
from megagpt.evaluation.sequences import Group, fitted, pair
from megagpt.evaluation.task import LAST_TOKEN, Item, Task


class Prompt(NamedTuple):
    """One row as it is scored."""

    group: Group
    context: str
    """The first option's context, with its examples."""
    dropped: int
    """Examples that were left out because the model is too short for them."""


def draw(pool: Sequence[Item], item: Item, count: int, seed: str) -> list[Item]:
    """`count` different rows of the pool at random, none of them equal to `item`, the row itself. The draw depends on
    `seed` alone. Raises UserError if the pool has too few."""
    generator, tried, chosen = random.Random(seed), set[int](), list[Item]()
    while len(chosen) < count:
        if len(tried) == len(pool):
            raise UserError(f"{count} shots: there are only {len(chosen)} rows to draw them from; lower --shots")
        i = generator.randrange(len(pool))
        if i not in tried:
            tried.add(i)
            if pool[i] != item:
                chosen.append(pool[i])
    return chosen


def prompt(task: Task, item: Item, examples: Sequence[Item], positions: int, place: str) -> Prompt:
    """The row behind its examples, for a model of that many positions. If it is too long, whole examples are left out
    from the left; if the row alone is, its left end is cut off. Raises UserError if no room is left for a context."""
    texts = [example.solved + task.separator for example in examples]
    for dropped in range(len(texts) + 1):
        before = task.instruction + "".join(texts[dropped:])
        group = [pair(before + context, continuation) for context, continuation in item.pairs]
        if dropped == len(texts) or max(len(tokens.ids) for tokens in group) <= positions + 1:
            break
    if task.scores[0] in LAST_TOKEN:
        group = [tokens._replace(first=len(tokens.ids) - 1) for tokens in group]
    return Prompt([fitted(tokens, positions, place) for tokens in group], before + item.pairs[0][0], dropped)
