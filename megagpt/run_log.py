"""A run's log, RUN/metrics.jsonl: one line of JSON for each event. All writing and reading of it is here. Each line has
`event`, `step`, `tokens_seen` and, since version 0.2, `time` (s since 1970); the event's own values follow. When a run
resumes, the lines past its checkpoint are dropped, because they will be written again: the log reads as if the run had
never stopped."""

import contextlib
import enum
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megagpt.errors import disk_error, disk_reason
from megagpt.files import json_lines, write_atomic

Line = dict[str, Any]


class Event(enum.StrEnum):
    """The kinds of lines."""

    STEP = "step"
    VALIDATION = "validation"
    EXAM = "exam"
    """Scores of exams: `exams`, a mapping of each task to the fields of ExamScore."""
    SAMPLES = "samples"
    CHECKPOINT = "checkpoint"
    """A checkpoint is complete."""
    RESUMED = "resumed"
    WENT_BACK = "went_back"
    """The run was told to resume from an older checkpoint."""
    SKIPPED = "skipped"
    """A step's update was skipped: its loss or gradient was not finite, or its loss was a spike."""
    RANKS = "ranks"
    """The ranks' own work, compared."""
    STRAGGLER = "straggler"
    PLAN = "plan"
    """Predicted beside measured memory and speed."""
    STOPPED = "stopped"
    FINISHED = "finished"


# Names in logs of version 0.1.
_OLD_EVENTS = {"pace": Event.RANKS, "slow_rank": Event.STRAGGLER}
_OLD_KEYS = {"samples_seen": "sequences_seen"}
# Start of the keys of exams in logs of before 0.2, and the endings of what belonged to a score.
_EXAM, _EXAM_PARTS = "exam/", {"_stderr": "standard_error", "_items": "items"}


@dataclass(frozen=True)
class ExamScore:
    """The headline of an exam. What a log does not tell is None; a number that is not finite is its name."""

    value: float | str | None = None
    standard_error: float | str | None = None
    items: int | None = None
    score: str | None = None
    """Its name, such as mean_token."""
    shots: int | None = None
    published: bool | None = None
    """Whether the rows have the published text, which the references are scored by."""
    sha256: str | None = None
    """Over the files of the rows."""
    commit: str | None = None
    """Of the data set on the hub; empty: the rows were the user's own."""


_FIELDS = {field.name for field in fields(ExamScore)}


def log_path(run: Path) -> Path:
    return run / "metrics.jsonl"


def read(run: Path, last_bytes: int = 0) -> Iterator[Line]:
    """The log's lines, oldest first, with today's names; none if there is no log. Lines that a crash cut off, or that
    name no event, are left out. `last_bytes`: read no more than that from the end; 0: read all."""
    for line in json_lines(log_path(run), last_bytes):
        if isinstance(line.get("event"), str) and "tokens_seen" in line:
            line["event"] = _OLD_EVENTS.get(line["event"], line["event"])
            yield {_OLD_KEYS.get(key, key): value for key, value in line.items()}


def newest(run: Path, up_to_tokens: float = math.inf) -> dict[str, Line]:
    """The last line of each event, up to a position."""
    return {line["event"]: line for line in read(run) if line["tokens_seen"] <= up_to_tokens}


def exam_scores(line: Line) -> dict[str, ExamScore]:
    """The scores in a line by task, also of a line from before 0.2, when they had keys of their own."""
    found = line.get("exams")
    if isinstance(found, dict):
        known = {name: values for name, values in found.items() if isinstance(values, dict)}
        return {name: ExamScore(**{k: v for k, v in values.items() if k in _FIELDS}) for name, values in known.items()}
    tasks = [key for key in line if key.startswith(_EXAM) and not _is_part(key, line)]
    parts = {key: {field: line.get(key + end) for end, field in _EXAM_PARTS.items()} for key in tasks}
    return {key.removeprefix(_EXAM): ExamScore(line[key], **parts[key]) for key in tasks}


def _is_part(key: str, line: Line) -> bool:
    """A task's own name may end in `_items`."""
    return any(key.removesuffix(end) in line for end in _EXAM_PARTS if key.endswith(end))


def _named(value: Any) -> Any:
    """The value with the names of numbers that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Writes the log. Only the main rank has one."""

    def __init__(self, run: Path, tokens: int, went_back: bool = False) -> None:
        """Drops the lines past `tokens`, the position that the run resumes from. `went_back`: other lines may follow
        than those that were there, which are moved to metrics.abandoned.jsonl. Raises ExpectedError if the disk refuses
        it."""
        self._path = log_path(run)
        with self.disk_errors():
            self._keep(tokens, went_back)
            self._file = self._path.open("a", encoding="utf-8")

    def _keep(self, tokens: int, went_back: bool) -> None:
        if self._path.exists():
            lines = list(json_lines(self._path))
            kept = [line for line in lines if line.get("tokens_seen", math.inf) <= tokens]
            if went_back:
                dropped = [line for line in lines if line.get("tokens_seen", math.inf) > tokens]
                with self._path.with_name("metrics.abandoned.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in dropped)
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def append(self, event: Event, step: int, tokens: int, values: Line) -> None:
        """Write a line. `None` becomes null; a number that is not finite, which JSON lacks, becomes its name. Raises
        ExpectedError if the disk refuses it."""
        line: Line = {"event": event, "step": step, "tokens_seen": tokens, "time": int(time.time())}
        line |= _named(values)
        with self.disk_errors():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turns the disk's errors into expected ones."""
        try:
            yield
        except OSError as error:
            text = f"{self._path.parent}: metrics cannot be written: {disk_reason(error)}"
            raise disk_error(text, error) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the error was reported when the line was written
            self._file.close()
