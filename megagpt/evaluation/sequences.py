"""From texts to the rows of batches: pair -> pack -> batches. Everything here is a function of the exam alone, not of
the ranks, so that every number of ranks computes the same batches."""

from collections.abc import Sequence
from typing import NamedTuple

from megagpt.data.tokenizer import END_OF_TEXT, encode
from megagpt.errors import UserError


class Tokens(NamedTuple):
    """A token sequence that a model scores."""

    ids: list[int]
    first: int
    """Index of the first token that is scored, at least 1; all later ones are."""
    cut: int = 0
    """Tokens that were cut off on the left, because the sequence is longer than the model."""


Group = list[Tokens]
"""Sequences of one row of an exam, which may begin alike: the options of a question."""


def pair(context: str, continuation: str) -> Tokens:
    """The tokens of both texts, of which those of the continuation are scored. White space at the end of the context
    goes to the continuation, because GPT-2's tokens begin with their space; an empty context is end-of-text."""
    before = encode(context.rstrip()).tolist()
    ids = encode(context + continuation).tolist()
    return Tokens(ids, len(before)) if before else Tokens([END_OF_TEXT, *ids], 1)


def fitted(tokens: Tokens, positions: int, place: str) -> Tokens:
    """The sequence with its left end cut off, if a model of that many positions needs it. Its last token is never fed,
    so positions + 1 tokens fit. Raises UserError if no room is left for a context; `place` names the row."""
    scored = len(tokens.ids) - tokens.first
    if scored > positions:
        problem = f"the continuation has {scored} tokens, and the model {positions} positions"
        raise UserError(f"{place}: {problem}: no room is left for a context; take the row out, or a longer model")
    cut = max(0, len(tokens.ids) - (positions + 1))
    return Tokens(tokens.ids[cut:], tokens.first - cut, tokens.cut + cut)


class Pack(NamedTuple):
    """Sequences in one row of a batch: their common beginning, then each one's tail."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    """0: the common beginning; i + 1: the tail of sequence i."""
    scored: list[tuple[int, int, int]]
    """Of each scored token, in order: the index whose successor it is, its id, and the number of its sequence."""


def pack(group: Group, number: int) -> list[Pack]:
    """The group's sequences, numbered from `number`, as one pack; each alone if they begin differently, as after their
    beginnings were cut off by different amounts. A pack is computed in one piece, so it would only be slower then."""
    shortest = min(min(len(ids) - 1, first) for ids, first, _ in group)
    shared = 0
    while shared < shortest and len({ids[shared] for ids, _, _ in group}) == 1:
        shared += 1
    if shared == 0 and len(group) > 1:
        return [p for i, tokens in enumerate(group) for p in pack([tokens], number + i)]
    ids, positions, segments = list(group[0].ids[:shared]), list(range(shared)), [0] * shared
    scored = []
    for i, sequence in enumerate(group):
        start = len(ids) - shared  # of the tail: token p is at p + start
        for p in range(sequence.first, len(sequence.ids)):
            scored.append((p - 1 if p - 1 < shared else p - 1 + start, sequence.ids[p], number + i))
        tail = range(shared, len(sequence.ids) - 1)  # the last token is never fed
        ids += [sequence.ids[p] for p in tail]
        positions += tail
        segments += [i + 1] * len(tail)
    return [Pack(ids, positions, segments, scored)]


def batches(packs: Sequence[Pack], budget: int) -> list[list[int]]:
    """Indices of the packs, longest first, in batches of at most `budget` tokens with padding, or of one pack."""
    found: list[list[int]] = []
    for i in sorted(range(len(packs)), key=lambda i: (-len(packs[i].ids), i)):
        if found and len(packs[found[-1][0]].ids) * (len(found[-1]) + 1) <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found
