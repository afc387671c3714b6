"""Where a run is, by what stands in its folder."""

import datetime
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.checkpoints.folder import newest_complete
from megagpt.config import Config
from megagpt.incarnations import list_incarnations
from megagpt.training.metrics import duration

# The speed is the median of so many last steps.
_STEPS = 100
# A run that has not written for the time of so many of its lines, and at least so long, is silent.
_SILENT_LINES, _SILENT_SECONDS = 10, 60.0
_TAIL_BYTES = 2**18


def describe(run: Path, config: Config) -> Iterator[str]:
    """Lines for people."""
    lines = _last_lines(run / "metrics.jsonl")
    steps = [line for line in lines if line["event"] == "step"]
    yield f"{run}: {_state(run, _seconds_between(steps[-_STEPS:]))}"
    if steps:
        last, total = steps[-1], config.train.tokens
        yield (
            f"progress    {last['tokens_seen'] / total:.1%} of {total:,} tokens, step {last['step']:,}, "
            f"loss {float(last['loss']):.4f}" + _validation(lines)
        )
        speed = statistics.median(step["tokens_per_second"] for step in steps[-_STEPS:])
        left = max(0, total - last["tokens_seen"])
        yield f"speed       {speed:,.0f} tok/s; {duration(left / speed)} to go at that speed"
    else:
        yield "progress    no step yet"
    yield f"checkpoint  {_checkpoint(run)}"
    starts = list_incarnations(run)
    yield f"starts      {len(starts)}, {max(0, len(starts) - 1)} of them restarts"
    for incarnation in starts[-5:]:
        start, end = incarnation.start(), incarnation.ended()
        ended = f"{end['outcome']} at {end['tokens_seen']:,} tokens: {end['reason']}" if end else "no word of its end"
        if incarnation is starts[-1] and not end:
            ended = "the last one"
        yield (
            f"  {incarnation.number}: {start.get('started', '?')} on {start.get('host', '?')}, "
            f"{start.get('engine', start.get('note', '?'))}, from {start.get('from_tokens', 0):,} tokens; {ended}"
        )
    yield f"go on with  megagpt train --resume {run}"


def _seconds_between(steps: list[dict[str, Any]]) -> float:
    """Usual time between two of these lines."""
    spans = [
        (now["tokens_seen"] - before["tokens_seen"]) / now["tokens_per_second"]
        for before, now in itertools.pairwise(steps)
    ]
    return statistics.median(spans) if spans else 0.0


def _state(run: Path, seconds_between: float) -> str:
    starts = list_incarnations(run)
    end = starts[-1].ended() if starts else {}
    if end:
        return f"{end['outcome']} ({end['reason']})"
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return "not begun"
    silent = time.time() - metrics.stat().st_mtime
    if silent > max(_SILENT_SECONDS, _SILENT_LINES * seconds_between):
        return f"silent for {duration(silent)}: killed, or busy with something long"
    return "running"


def _validation(lines: list[dict[str, Any]]) -> str:
    found = [line for line in lines if line["event"] == "validation"]
    return f", validation loss {float(found[-1]['validation_loss']):.4f}" if found else ""


def _checkpoint(run: Path) -> str:
    newest = newest_complete(run, lambda text: None)
    if newest is None:
        return "none yet"
    saved = datetime.datetime.fromisoformat(newest.meta()["saved"])
    ago = (datetime.datetime.now(datetime.UTC) - saved).total_seconds()
    return f"{newest.tokens:,} tokens, saved {duration(max(0.0, ago))} ago: {newest.path}"


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of the metrics, as many as a few thousand steps leave."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        texts = file.read().splitlines()
    lines = []
    for text in texts[1 if size > _TAIL_BYTES else 0 :]:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # the one that is being written
    return lines
