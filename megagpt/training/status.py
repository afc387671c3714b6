"""The state of a run, read from its folder, and the next step for its user."""

import datetime
import itertools
import math
import shlex
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megagpt.checkpoints.checkpoint import OpenCheckpoint
from megagpt.checkpoints.folder import newest_complete
from megagpt.config import Config
from megagpt.config_file import load_run
from megagpt.console import duration
from megagpt.errors import ExpectedError, UserError
from megagpt.evaluation.results import Value
from megagpt.incarnations import Incarnation, list_incarnations
from megagpt.launchers import job_number
from megagpt.planning.forecast import beside, read_forecast
from megagpt.run_log import Event, Line, exam_scores, log_path, read
from megagpt.training.run_folder import TAIL_BYTES, has_ended, iso, last_sign_of_life, resume_command

# Number of last steps whose median speed is shown.
_STEPS = 100
# Bytes at the end of the log that are searched for the last validation and the last exams.
_MOST_BYTES = 2**26
# A run is silent if its log has no new line for this many steps and this many seconds.
_SILENT_LINES, _SILENT_SECONDS = 10, 60.0


@dataclass(frozen=True)
class Status:
    """A run's state, read from its folder. Numbers that are unknown are None; a loss may be "nan" or "inf"."""

    run: str
    state: str
    """not begun, starting, running, silent, dead, stopped, failed or finished; or unreadable."""
    text: str
    """The state with its reason, for people."""
    next: dict[str, str] = field(default_factory=dict)
    """Possible next steps: label -> command."""
    tokens_seen: int = 0
    total_tokens: int = 0
    """Tokens of all whole sequences: the run ends there."""
    step: int | None = None
    loss: float | str | None = None
    validation_loss: float | str | None = None
    exams: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest scores: task -> `tokens` and the fields of `run_log.ExamScore`."""
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    micro_batch: int | None = None
    """Sequences of a micro-batch in the last incarnation."""
    plan: dict[str, Any] | None = None
    """The last incarnation's plan, by the fields of Forecast; None on a CPU."""
    peak_memory_bytes: float | None = None
    """Of the last step: on a GPU PyTorch's tensors, on a CPU the process."""
    last_sign_of_life: str | None = None
    """The time of the last change in the folder, ISO 8601, UTC."""
    checkpoint: dict[str, Any] | None = None
    """`tokens`, `saved` and `path` of the newest complete one; `proven`: whether a later step was finite."""
    incarnations: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def progress(self) -> float:
        return self.tokens_seen / self.total_tokens if self.total_tokens else 0.0


def read_status(run: Path, config: Config) -> Status:
    """The status of a run with this config."""
    lines = list(read(run, TAIL_BYTES))
    steps = [line for line in lines if line["event"] == Event.STEP and _count(line["tokens_seen"]) is not None]
    found = list_incarnations(run)
    sign = last_sign_of_life(run)
    state, text = _state(run, found, steps, sign)
    validated = _measured(run, Event.VALIDATION, lines) if config.validation.tokens else []
    validations = [_loss(line.get("validation_loss")) for line in validated]
    exams: dict[str, dict[str, Any]] = {}
    for line in _measured(run, Event.EXAM, lines) if config.evaluation.tasks else []:
        at = {"tokens": _count(line["tokens_seen"])}
        exams |= {task: {**at, **asdict(score)} for task, score in exam_scores(line).items()}
    last, total = steps[-1] if steps else {}, config.total_sequences * config.model.context
    speeds = [speed for step in steps[-_STEPS:] if (speed := _speed(step))]
    speed = statistics.median(speeds) if speeds else None
    newest = newest_complete(run)
    tokens = last.get("tokens_seen", 0)
    start = found[-1].start() if found else {}
    planned = read_forecast(start.get("plan"))
    return Status(
        str(run), state, text, _next(run, config, state, found), tokens, total, _count(last.get("step")),
        _loss(last.get("loss")), validations[-1] if validations else None, exams, speed,
        max(0, total - tokens) / speed if speed else None, _count(start.get("micro_batch")),
        planned.as_json() if planned else None, _number(last.get("peak_memory_bytes")), iso(sign) if sign else None,
        _facts(newest) if newest else None, len(found),
    )  # fmt: skip


def _measured(run: Path, event: Event, tail: list[Line]) -> list[Line]:
    """The last lines of an event, which may lie before the log's tail: from one to the next there may be many steps."""
    found, size = [line for line in tail if line["event"] == event], TAIL_BYTES
    log = log_path(run)
    whole = log.stat().st_size if log.exists() else 0
    while not found and size < min(whole, _MOST_BYTES):
        size *= 16
        found = [line for line in read(run, size) if line["event"] == event]
    return found


def _number(value: Any) -> float | None:
    """A value of the log as a number; None for anything else: a person may have edited the log."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and _number(value) is not None else None


def _loss(value: Any) -> float | str | None:
    return value if value in ("nan", "inf", "-inf") else _number(value)


def _speed(step: Line) -> float | None:
    value = _number(step.get("tokens_per_second"))
    return value if value is not None and 0 < value < math.inf else None


def status_lines(status: Status) -> Iterator[str]:
    """The status for people, with the last incarnations."""
    yield f"{status.run}: {status.text}"
    if status.step is not None and status.tokens_per_second is not None and status.seconds_left is not None:
        losses = f"loss {float(status.loss or 0):.4f}"
        if status.validation_loss is not None:
            losses += f", validation loss {float(status.validation_loss):.4f}"
        yield f"progress     {status.progress:.1%} of {status.total_tokens:,} tokens, step {status.step:,}, {losses}"
        speed, left = status.tokens_per_second, duration(status.seconds_left)
        yield f"speed        {speed:,.0f} tok/s; {left} to go at that speed"
        planned = read_forecast(status.plan)
        if planned and (texts := list(beside(planned, status.peak_memory_bytes, speed))):
            yield f"plan         {'; '.join(texts)}"
    else:
        yield "progress     no step yet"
    if status.exams:
        yield f"exams        {'; '.join(_exams(status))}"
    yield f"checkpoint   {_checkpoint(status)}"
    found = list_incarnations(Path(status.run))
    yield f"incarnations {len(found)}"
    for incarnation in found[-5:]:
        start, end = incarnation.start(), incarnation.ended()
        ended = "the last one" if incarnation is found[-1] else "left no record of its end"
        if end:
            ended = f"{end['outcome']} at {end['tokens_seen']:,} tokens: {end['reason']}"
        engine = start.get("engine", start.get("note", "?"))
        if size := _count(start.get("micro_batch")):
            engine += f", micro-batches of {size}"
        begun = f"{start.get('started', '?')} on {start.get('host', '?')}, {engine}"
        yield f"  {incarnation.number}: {begun}, from {start.get('from_tokens', 0):,} tokens; {ended}"
    for what, command in status.next.items():
        yield f"{what:12} {command}"


def _exams(status: Status) -> Iterator[str]:
    """Each newest score, and where it was taken if that is not where the one before it was."""
    shown = {task: score for task, score in status.exams.items() if _loss(score["value"]) is not None}
    for i, (task, score) in enumerate(shown.items()):
        text = Value(str(score["score"] or ""), "", float(score["value"]), _number(score["standard_error"])).text
        others = [each["tokens"] for each in list(shown.values())[i + 1 : i + 2]]
        yield f"{task} {text}" + ("" if score["tokens"] in others else f" at {score['tokens'] or 0:,} tokens")


def list_runs(folder: Path) -> list[Status]:
    """The status of each run in a folder, by name. Raises UserError if there is none."""
    runs = sorted(path.parent for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
    if not runs:
        missing = "holds no run" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {missing}; name a run's folder, or the folder that holds your runs")
    found = []
    for run in runs:
        try:
            found.append(read_status(run, load_run(run)))
        except (ExpectedError, OSError) as error:  # such as a config of a newer version
            found.append(Status(str(run), "unreadable", f"unreadable: {error}"))
    return found


def table(found: list[Status]) -> Iterator[str]:
    """A line for each run."""
    width = max(len(status.run) for status in found)
    yield f"{'run':{width}}  {'state':10}  {'done':>6}  {'tokens':>17}  {'loss':>7}  to go"
    for s in found:
        loss = "" if s.loss is None else f"{float(s.loss):.4f}"
        left = duration(s.seconds_left) if s.seconds_left is not None and s.state == "running" else ""
        yield f"{s.run:{width}}  {s.state:10}  {s.progress:6.1%}  {s.tokens_seen:17,}  {loss:>7}  {left}".rstrip()


def _state(run: Path, found: list[Incarnation], steps: list[Line], sign: float | None) -> tuple[str, str]:
    """The state and its text."""
    if not found:
        return ("running", "running") if log_path(run).exists() else ("not begun", "not begun")
    start, end = found[-1].start(), found[-1].ended()
    if end:
        return end["outcome"], f"{end['outcome']} ({end['reason']})"
    ended, host = has_ended(start), start.get("host", "?")
    if ended:
        return "dead", f"dead: its process on {host} has ended and left no record, so it was killed"
    spans = [
        (now["tokens_seen"] - before["tokens_seen"]) / speed
        for before, now in itertools.pairwise(steps[-_STEPS:])
        if (speed := _speed(now))
    ]
    silent = time.time() - (sign or 0.0)
    quiet = silent > max(_SILENT_SECONDS, _SILENT_LINES * statistics.median(spans or [0.0]))
    if ended is None and quiet:
        return "silent", f"silent for {duration(silent)}: killed, or busy with something long, on {host}"
    here = f" on {host}" if ended is None and "host" in start else ""
    if not any(step["tokens_seen"] > start.get("from_tokens", 0) for step in steps[-1:]):
        return "starting", f"starting{here}"
    return "running", f"running{here}" + (f", without a line for {duration(silent)}" if quiet else "")


def _next(run: Path, config: Config, state: str, found: list[Incarnation]) -> dict[str, str]:
    """The user's likely next steps: label -> command."""
    name = shlex.quote(str(run))
    watch = {"watch with": f"tensorboard --logdir {shlex.quote(str(run.parent))}"}
    resume = {"resume with": resume_command(run)}
    if state == "finished":
        sample = f'megagpt sample {name} --prompt "The meaning of life is"'
        export, show = f"megagpt export {name} --to {name}/export", f"megagpt report {name}"
        exports = {"export with": export} if config.model.attention == "dense" else {}
        return {"sample with": sample, **exports, "show with": show, **watch}
    start = found[-1].start() if found else {}
    if state in ("starting", "running", "silent") and start:
        stop = _stop(start)
        if state == "silent":
            return {**stop, "if it died": resume["resume with"]}
        return {**watch, **stop}
    return resume


def _stop(start: dict[str, Any]) -> dict[str, str]:
    if job := start.get("job"):
        return {"stop with": f"scancel --signal=INT {job_number(job)}"}
    process = start.get("process")
    if not isinstance(process, dict):
        return {"stop with": f"Ctrl-C in its terminal on {start.get('host', 'its host')}"}
    kill = f"kill -INT {process['pid']}"
    return {"stop with": kill if has_ended(start) is False else f"{kill}  (on {start.get('host', 'its host')})"}


def _facts(newest: OpenCheckpoint) -> dict[str, Any]:
    meta, checkpoint = newest.meta, newest.checkpoint
    path, proven = str(checkpoint.path), checkpoint.is_proven
    return {"tokens": meta.tokens_seen, "saved": meta.saved, "path": path, "proven": proven}


def _checkpoint(status: Status) -> str:
    if status.checkpoint is None:
        return "none yet"
    saved = datetime.datetime.fromisoformat(status.checkpoint["saved"])
    ago = (datetime.datetime.now(datetime.UTC) - saved).total_seconds()
    tokens, path = status.checkpoint["tokens"], status.checkpoint["path"]
    unproven = "" if status.checkpoint["proven"] else ", unproven (no later step was finite yet)"
    return f"{tokens:,} tokens, saved {duration(max(0.0, ago))} ago{unproven}: {path}"
