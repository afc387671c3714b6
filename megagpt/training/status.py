"""The state of a run, read from its folder."""

import datetime
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from megagpt.checkpoints.folder import newest_complete
from megagpt.config import Config
from megagpt.console import duration
from megagpt.incarnations import list_incarnations
from megagpt.run_log import Event, log_path, read

# Number of last steps whose median speed is shown.
_STEPS = 100
# A run is silent if its log has no new line for this many steps and this many seconds.
_SILENT_LINES, _SILENT_SECONDS = 10, 60.0
# Bytes at the end of the log that are read: a few hundred steps.
_TAIL_BYTES = 2**18


def status_lines(run: Path, config: Config) -> Iterator[str]:
    """Lines for people."""
    lines = list(read(run, _TAIL_BYTES))
    steps = [line for line in lines if line["event"] == Event.STEP]
    pairs = itertools.pairwise(steps[-_STEPS:])
    spans = [(now["tokens_seen"] - before["tokens_seen"]) / now["tokens_per_second"] for before, now in pairs]
    yield f"{run}: {_state(run, seconds_between=statistics.median(spans or [0.0]))}"
    if steps:
        last, total = steps[-1], config.train.tokens
        validations = [line["validation_loss"] for line in lines if line["event"] == Event.VALIDATION]
        losses = f"loss {float(last['loss']):.4f}"
        losses += f", validation loss {float(validations[-1]):.4f}" if validations else ""
        yield f"progress     {last['tokens_seen'] / total:.1%} of {total:,} tokens, step {last['step']:,}, {losses}"
        speed = statistics.median(step["tokens_per_second"] for step in steps[-_STEPS:])
        left = max(0, total - last["tokens_seen"])
        yield f"speed        {speed:,.0f} tok/s; {duration(left / speed)} to go at that speed"
    else:
        yield "progress     no step yet"
    yield f"checkpoint   {_checkpoint(run)}"
    found = list_incarnations(run)
    yield f"incarnations {len(found)}"
    for incarnation in found[-5:]:
        start, end = incarnation.start(), incarnation.ended()
        ended = "the last one" if incarnation is found[-1] else "left no record of its end"
        if end:
            ended = f"{end['outcome']} at {end['tokens_seen']:,} tokens: {end['reason']}"
        engine = start.get("engine", start.get("note", "?"))
        begun = f"{start.get('started', '?')} on {start.get('host', '?')}, {engine}"
        yield f"  {incarnation.number}: {begun}, from {start.get('from_tokens', 0):,} tokens; {ended}"
    yield f"resume with  megagpt train --resume {run}"


def _state(run: Path, seconds_between: float) -> str:
    found = list_incarnations(run)
    if found and (end := found[-1].ended()):
        return f"{end['outcome']} ({end['reason']})"
    log = log_path(run)
    if not log.exists():
        return "not begun"
    silent = time.time() - log.stat().st_mtime
    if silent > max(_SILENT_SECONDS, _SILENT_LINES * seconds_between):
        return f"silent for {duration(silent)}: killed, or busy with something long"
    return "running"


def _checkpoint(run: Path) -> str:
    newest = newest_complete(run)
    if newest is None:
        return "none yet"
    saved = datetime.datetime.fromisoformat(newest.meta.saved)
    ago = (datetime.datetime.now(datetime.UTC) - saved).total_seconds()
    return f"{newest.meta.tokens_seen:,} tokens, saved {duration(max(0.0, ago))} ago: {newest.path}"
