"""Perplexity of texts that are longer than the model: windows that overlap by what is not their stride."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from megagpt.data.tokenizer import END_OF_TEXT, encode
from megagpt.evaluation.known import known_scores
from megagpt.evaluation.results import Score, Value, perplexity
from megagpt.evaluation.sequences import Group, Tokens


class Windows(NamedTuple):
    """Documents cut for a model. Each token of each document is scored once."""

    groups: list[Group]
    """One window each."""
    words: int
    """Words of the published texts, as white space separates them."""
    bytes: int
    """Their bytes in UTF-8."""


def windows(published: Sequence[str], texts: Sequence[str], positions: int, stride: int) -> Windows:
    """Windows over each text, for a model of that many positions. The first window of a text scores `positions` tokens
    behind end-of-text; each further one the next `stride` tokens, behind the tokens before them, as many as fit."""
    groups: list[Group] = []
    for text in texts:
        ids = encode(text).tolist()
        end = 0
        while end < len(ids):
            start, end = end, min(len(ids), end + (stride if end else positions))
            begin = end - (positions + 1)
            fed = ids[begin:end] if begin >= 0 else [END_OF_TEXT, *ids[:end]]
            groups.append([Tokens(fed, len(fed) - (end - start))])
    words = sum(len(text.split()) for text in published)
    return Windows(groups, words, sum(len(text.encode("utf-8", "replace")) for text in published))


def text_values(task: str, scores: Sequence[Score], cut: Windows, how: str) -> list[Value]:
    """Perplexity per token, the headline; per word of the published text; bits per byte. If windows were left out, the
    words and bytes of the rest are unknown, and only the value per token is given."""
    sums, counts = [score.log_likelihood for score in scores], [score.tokens for score in scores]
    per_token, error = perplexity(sums, counts)
    found = [_value(task, "per_token_perplexity", f"perplexity per token, {how}", per_token, error)]
    if len(scores) < len(cut.groups):
        return found
    total, tokens = -math.fsum(sums), sum(counts)
    deviation = None if error is None else error / per_token * tokens  # of the whole text's log-likelihood
    per_word = math.exp(min(700.0, total / cut.words))
    of_word = None if deviation is None else per_word * deviation / cut.words
    of_bytes = cut.bytes * math.log(2)
    return [
        *found,
        _value(task, "per_word_perplexity", f"perplexity per word of the published text, {how}", per_word, of_word),
        _value(
            task, "bits_per_byte", f"bits per byte of the published text, {how}", total / of_bytes,
            None if deviation is None else deviation / of_bytes,
        ),
    ]  # fmt: skip


def _value(task: str, name: str, convention: str, value: float, error: float | None) -> Value:
    return Value(name, convention, value, error, known_scores(task, name, 0))
