"""An exam's output: on the way, its rate and the time left; at the end, a table with references."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from megagpt.console import duration, say
from megagpt.evaluation.results import Result, Value
from megagpt.evaluation.scoring import Progress
from megagpt.models.presets import PRESETS, ModelConfig

_PLAIN_SECONDS = 10.0  # between two lines of a log


class ShownProgress(Progress):
    """Shows items done, items/s and the time left: a bar on a terminal, plain lines in a log; on the main rank."""

    def __init__(self, name: str, items: int, is_main: bool, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._name, self._items, self._shows, self._interrupted = name, items, is_main, interrupted
        self._start = self._last = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if is_main and sys.stderr.isatty():
            self._bar = tqdm(bar_format="{desc}", leave=False)

    def interrupted(self) -> bool:
        return self._interrupted()

    def done(self, share: float) -> None:
        now = time.monotonic()
        if not self._shows or share <= 0:
            return
        items = share * self._items
        rate = items / max(now - self._start, 1e-9)
        left = duration((self._items - items) / rate)
        text = f"{self._name}: {share:.0%} | {items:,.0f} items | {rate:,.1f} items/s | ETA {left}"
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif now - self._last > _PLAIN_SECONDS:
            self._last = now
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def table(results: Sequence[Result], model: ModelConfig) -> Iterator[str]:
    """The lines of a table: each score with its standard error, items, shots, and the references of models of that
    size; then each convention in words."""
    heads = ["task", "score", "value", "items", "shots", "references"]
    lines = [heads]
    for result in results:
        for i, value in enumerate(result.values):
            cells = [value.name, value.text, f"{result.items:,}", str(result.shots)]
            known = "; ".join(near_references(value, model))
            lines.append(["" if i else result.task, *cells, known])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
    yield ""
    for result in results:
        yield from notes(result)
    said = {value.name: value.convention for result in results for value in result.values}
    yield from (f"{name}: {text}" for name, text in said.items())
    if any(value.references for result in results for value in result.values):
        yield "references: ? not confirmed by a second source; * another text or prompt; all sizes: --json"


def notes(result: Result) -> Iterator[str]:
    """Sentences about what was left out or cut."""
    limited = "" if result.items == result.of_items else f", {result.items:,} of {result.of_items:,} items"
    yield f"{result.task}: {result.text}{limited}"
    if result.cut_rows:
        yield f"{result.task}: {result.cut_rows:,} rows are longer than the model and were cut on the left"
    if unfit := result.details.get("shots_unfit"):
        yield f"{result.task}: {unfit:,} rows with an empty answer are no examples"
    if result.dropped_shots:
        asked = result.shots * result.items
        yield f"{result.task}: {result.dropped_shots:,} of {asked:,} examples do not fit into the model; left out"


def near_references(value: Value, model: ModelConfig) -> list[str]:
    """The references of GPT-2's and of GPT-3's model that is nearest to this one in size."""

    def distance(reference: dict[str, Any]) -> float:
        return abs(PRESETS[reference["model"]].model.parameters / model.parameters - 1)

    found = []
    for family in ("gpt2", "gpt3"):
        known = [r for r in value.references if r["model"].startswith(family)]
        nearest = min(map(distance, known), default=0.0)
        for r in [r for r in known if distance(r) == nearest]:
            marks = ("" if r["firm"] else "?") + ("" if r["same_text"] else "*")
            found.append(f"{r['label']} {r['value']:.4g}{marks}")
    return found
