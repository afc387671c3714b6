"""From the scores of rows to an exam's values, each with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from megagpt.evaluation.task import Item


class Score(NamedTuple):
    """The scored tokens of one sequence."""

    log_likelihood: float
    """Their sum, in nats."""
    tokens: int
    greedy: bool
    """Whether greedy decoding writes all of them."""


Scores = list[list[Score]]
"""The scores of groups, sequence by sequence."""


@dataclass(frozen=True)
class Value:
    """One number of an exam."""

    name: str
    """The score's name, such as mean_token."""
    convention: str
    """How it is computed, for people."""
    value: float
    standard_error: float | None
    """None if there are too few rows to tell."""
    references: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Accuracies to 4 decimals, perplexities to 5 digits: what neither batches nor threads change."""
        if "perplexity" in self.name or self.name.startswith("bits"):
            value, error = f"{self.value:#.5g}", f"{self.standard_error or 0:.2g}"
        else:
            value, error = f"{self.value:.4f}", f"{self.standard_error or 0:.4f}"
        return value if self.standard_error is None else f"{value} ± {error}"


@dataclass(frozen=True)
class Result:
    """An exam's outcome; `as_json` is what --json writes."""

    task: str
    values: list[Value]
    items: int
    """Rows, or windows of a text."""
    of_items: int
    """Rows in the file; more than `items` under a limit."""
    shots: int
    text: str
    """The text that the model read, for people."""
    cut_rows: int = 0
    """Rows whose left end was cut off, because they are longer than the model."""
    dropped_shots: int = 0
    """Examples that were left out, over all rows, because the model is too short for them."""
    details: dict[str, Any] = field(default_factory=dict)
    """Facts for a repetition: files, checksum, commit, seed, the prompt of the first row."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(right: Sequence[bool]) -> tuple[float, float | None]:
    """The share of right answers, and its standard error: sample deviation / sqrt(n)."""
    n, p = len(right), sum(right) / len(right)
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def perplexity(log_likelihoods: Sequence[float], counts: Sequence[int] | None = None) -> tuple[float, float | None]:
    """exp(-mean) of log-likelihoods in nats, and its standard error by the delta method: perplexity x that of the mean.
    `counts`: units in each value, such as the tokens of a window; 1 each if None."""
    units = list(counts) if counts is not None else [1] * len(log_likelihoods)
    total, n = sum(units), len(units)
    mean = -math.fsum(log_likelihoods) / total
    value = math.exp(mean) if mean < 700 else math.inf
    if n < 2:
        return value, None
    residuals = [(-value - mean * unit) ** 2 for value, unit in zip(log_likelihoods, units, strict=True)]
    return value, value * math.sqrt(n / (n - 1) * math.fsum(residuals)) / total


def best(values: Sequence[float]) -> int:
    """Index of the largest; of equal ones, the first."""
    return max(range(len(values)), key=lambda i: values[i])


def choice(name: str, item: Item, scores: Sequence[Score], without: Sequence[Score]) -> int:
    """The option that a model chooses by the score of that name. `without`: the options without their question, for
    "unconditional"."""
    sums = [score.log_likelihood for score in scores]
    # Without the space before them, as lm-evaluation-harness counts.
    texts = [continuation.removeprefix(" ") for _, continuation in item.pairs]
    match name:
        case "mean_token":
            return best([total / score.tokens for total, score in zip(sums, scores, strict=True)])
        case "mean_byte":
            return best([total / len(text.encode("utf-8", "replace")) for total, text in zip(sums, texts, strict=True)])
        case "mean_char":
            return best([total / len(text) for total, text in zip(sums, texts, strict=True)])
        case "unconditional":
            return best([total - other.log_likelihood for total, other in zip(sums, without, strict=True)])
        case "sum":
            return best(sums)
    raise ValueError(f"{name} does not choose an option")


def values_of(name: str, items: Sequence[Item], rows: Scores, without: Scores) -> list[Any]:
    """Of each row by the score of that name: whether it is right, or its log-likelihood. `without`: the options without
    their question; empty if no score needs them."""
    if "perplexity" in name:
        return [scores[0].log_likelihood for scores in rows]
    if name in ("greedy", "last_token"):
        return [scores[0].greedy for scores in rows]
    others: Scores = without or [[] for _ in rows]
    return [choice(name, *row) == row[0].gold for row in zip(items, rows, others, strict=True)]
