"""Few-shot prompts: solved examples in front of a row, drawn by seed, the same for any number of ranks."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megagpt.data.tokenizer import encode
from megagpt.errors import UserError
from megagpt.evaluation.sequences import Group, Tokens, fitted, pair
from megagpt.evaluation.task import LAST_TOKEN, Item, Task

Encoder = Callable[[str], Any]
"""A text -> an array of its tokens."""
_SPACE = " \t\r\n"


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


def prompt(
    task: Task, item: Item, examples: Sequence[Item], positions: int, place: str, encoded: Encoder = encode
) -> Prompt:
    """The row behind its examples, for a model of that many positions. If it is too long, whole examples are left out
    from the left; if the row alone is, its left end is cut off. `encoded`: the tokens of an example's text; one that
    remembers them saves time. Raises UserError if no room is left for a context."""
    solved = [example.solved for example in examples]
    dropped, group = _joined(task, item, solved, positions, encoded) or _whole(task, item, solved, positions)
    if task.scores[0] in LAST_TOKEN:
        group = [tokens._replace(first=len(tokens.ids) - 1) for tokens in group]
    context = _before(task, solved[dropped:]) + item.pairs[0][0]
    return Prompt([fitted(tokens, positions, place) for tokens in group], context, dropped)


def _before(task: Task, solved: Sequence[str]) -> str:
    return task.instruction + "".join(text + task.separator for text in solved)


def _joined(
    task: Task, item: Item, solved: Sequence[str], positions: int, encoded: Encoder
) -> tuple[int, list[Tokens]] | None:
    """How many examples are left out, and the tokens of the rest. They are those of the parts, each encoded by itself:
    in GPT-2's pattern, no token has white space behind another character. None for texts without such places."""
    bodies = [text.rstrip(_SPACE) for text in solved]
    ends = [text[len(body) :] + task.separator for text, body in zip(solved, bodies, strict=True)]
    parts = [end + body for end, body in zip(["", *ends], bodies, strict=False)]
    behind = ends[-1] if ends else ""
    starts = [*parts[1:], *(behind + context for context, _ in item.pairs)]
    if not all(text.strip() and text[0] in _SPACE for text in starts) or any(not b or b[-1].isspace() for b in bodies):
        return None
    own = [pair(behind + context, continuation) for context, continuation in item.pairs]
    rest = sum(len(encoded(part)) for part in parts[1:]) + max(len(tokens.ids) for tokens in own)
    for dropped, body in enumerate(bodies):
        first, others = encoded(task.instruction + body), parts[dropped + 1 :]
        if len(first) + rest <= positions + 1:
            before = first.tolist() + [token for part in others for token in encoded(part).tolist()]
            return dropped, [Tokens(before + ids, len(before) + start) for ids, start, _ in own]
        rest -= len(encoded(others[0])) if others else 0
    return len(bodies), _whole(task, item, [], positions)[1]


def _whole(task: Task, item: Item, solved: Sequence[str], positions: int) -> tuple[int, list[Tokens]]:
    """The same from the tokens of the whole texts."""
    for dropped in range(len(solved) + 1):
        before = _before(task, solved[dropped:])
        group = [pair(before + context, continuation) for context, continuation in item.pairs]
        if max(len(tokens.ids) for tokens in group) <= positions + 1:
            break
    return dropped, group
