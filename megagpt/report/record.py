"""A run's log as columns of numbers: read once, line by line, so that logs of millions of steps fit."""

import array
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megagpt.config import Config
from megagpt.config_file import load_run
from megagpt.run_log import Event, ExamScore, Line, exam_scores, read

Axis = Literal["tokens", "flops", "hours"]
# Columns of the steps, by their keys in the log.
_COLUMNS = (
    "tokens_seen", "step", "loss", "gradient_norm", "lr", "tokens_per_second", "mfu", "peak_memory_bytes",
    "data_wait_seconds", "step_seconds",
)  # fmt: skip
# Events that a reader of the page should know of.
_NOTABLE = (Event.SKIPPED, Event.STRAGGLER, Event.WENT_BACK)


@dataclass
class Points:
    """A quantity that was measured now and then."""

    tokens: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Standard errors; NaN where the log has none."""
    items: list[int | None] = field(default_factory=list)

    def add(self, tokens: int, value: float, error: float = math.nan, items: int | None = None) -> None:
        self.tokens.append(tokens)
        self.values.append(value)
        self.errors.append(error)
        self.items.append(items)


@dataclass
class Record:
    """One run's log."""

    folder: Path
    config: Config
    steps: dict[str, np.ndarray]
    """Column -> a value for each step that was logged, float64; NaN where the log has none."""
    validation: Points
    exams: dict[str, Points]
    """Task -> its scores."""
    newest: dict[str, ExamScore]
    """Task -> its last score, with how it was taken."""
    samples: list[tuple[int, list[str]]]
    """Tokens and the texts that the model then made, oldest first."""
    notable: list[Line]
    plan: Line | None = None
    """The last comparison with the plan."""

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def is_empty(self) -> bool:
        return not (len(self.tokens) or self.validation.tokens or self.exams)

    @property
    def tokens(self) -> np.ndarray:
        return self.steps["tokens_seen"]

    @property
    def reached(self) -> int:
        """Tokens seen."""
        return int(self.tokens[-1]) if len(self.tokens) else 0

    @property
    def training_seconds(self) -> np.ndarray:
        """The time that the steps took up to each logged one. Saves, validations, samples, exams and what lay between
        two incarnations are left out, and so are steps that were taken again."""
        before = np.concatenate(([0.0], self.tokens[:-1]))
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = (self.tokens - before) / self.steps["tokens_per_second"]
        return np.cumsum(np.where(np.isfinite(seconds) & (seconds > 0), seconds, 0.0))

    def along(self, axis: Axis, tokens: Sequence[float] | np.ndarray) -> np.ndarray:
        """Positions in tokens as tokens, as FLOPs (by `flops_per_token` of the model), or as hours of training."""
        places = np.asarray(tokens, dtype=np.float64)
        if axis == "flops":
            return places * self.config.model.flops_per_token
        if axis == "hours":
            known = np.concatenate(([0.0], self.tokens)), np.concatenate(([0.0], self.training_seconds))
            return np.interp(places, *known) / 3600
        return places


def read_record(run: Path) -> Record:
    """The log of a run of any version. Raises UserError if the folder is no run's."""
    config = load_run(run)
    columns = {name: array.array("d") for name in _COLUMNS}
    validation, exams, newest = Points(), dict[str, Points](), dict[str, ExamScore]()
    samples: list[tuple[int, list[str]]] = []
    notable: list[Line] = []
    plan = None
    for line in read(run):
        tokens = number(line["tokens_seen"])
        if not math.isfinite(tokens):
            continue
        event = line["event"]
        if event == Event.STEP:
            for name, column in columns.items():
                column.append(number(line.get(name)))
        elif event == Event.VALIDATION:
            validation.add(int(tokens), number(line.get("validation_loss")))
        elif event == Event.SAMPLES:
            samples.append((int(tokens), _texts(line.get("samples"))))
        elif event == Event.PLAN:
            plan = line
        elif event in _NOTABLE:
            notable.append(line)
        newest |= _add_exams(exams, int(tokens), line)
    steps = {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}
    return Record(run, config, steps, validation, exams, newest, samples, notable, plan)


def _add_exams(exams: dict[str, Points], tokens: int, line: Line) -> dict[str, ExamScore]:
    """Adds the scores of a line, and returns them."""
    found = exam_scores(line)
    for task, score in found.items():
        items = number(score.items)
        count = int(items) if math.isfinite(items) else None
        exams.setdefault(task, Points()).add(tokens, number(score.value), number(score.standard_error), count)
    return found


def _texts(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def number(value: Any) -> float:
    """A value of the log as a number. JSON has no infinity, so the log has its name; anything else is NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


@dataclass(frozen=True)
class Bins:
    """A long curve as few points: the mean of each stretch, and the range of its values."""

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def binned(tokens: np.ndarray, values: np.ndarray, most: int = 400) -> Bins:
    """A curve with at most `most` points. Values that are not finite are left out; a stretch without any other is a
    gap (NaN)."""
    count = len(values)
    finite = np.isfinite(values)
    starts = np.unique(np.linspace(0, count, min(most, count), endpoint=False).astype(np.int64))
    if not count:
        return Bins(*(np.empty(0),) * 4)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    known = np.add.reduceat(finite.astype(np.float64), starts)
    empty = known == 0
    mean = np.where(empty, np.nan, total / np.maximum(known, 1))
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    ends = np.append(starts[1:], count) - 1
    return Bins(tokens[ends], mean, np.where(empty, np.nan, low), np.where(empty, np.nan, high))


def some(points: Iterable[int], most: int) -> list[int]:
    """At most `most` of these, evenly spread, with the first and the last."""
    places = list(points)
    if len(places) <= most:
        return places
    return [places[i] for i in np.unique(np.linspace(0, len(places) - 1, most).round().astype(int))]
