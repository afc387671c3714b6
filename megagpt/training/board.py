"""A run in TensorBoard: which number is in which chart.

RUN               all numbers and texts; the horizontal axis is steps
RUN/train         the training loss again; the horizontal axis is tokens
RUN/validation    the validation loss again; the horizontal axis is tokens

A chart has a line for each folder with events of its tag: so a chart with both losses needs two folders. A resume
purges a folder from one position on: so a folder has one horizontal axis."""

import contextlib
from pathlib import Path

from tensorboard.compat.proto import event_pb2
from torch.utils.tensorboard import SummaryWriter

from megagpt.position import Position
from megagpt.run_log import Event, Line, exam_scores, read

# Panels and the values in each; other values are in "system". TensorBoard sorts panels and charts by name: so the loss
# comes first, then speed, and totals, which only grow, come last.
_PANELS = {
    "loss": ("loss", "unigram_loss", "validation_loss"),
    "mfu_and_speed": ("mfu", "step_seconds", "tokens_per_second"),
    "optimizer": ("lr", "gradient_norm", "batch_tokens", "loss_scale"),
    "ranks": (
        "ranks_compute_median", "ranks_compute_slowest", "ranks_slowest_rank", "ranks_data_wait_longest",
        "ranks_communication_wait_median",
    ),
    "plan": (
        "predicted_memory_bytes", "measured_memory_bytes", "predicted_tokens_per_second", "measured_tokens_per_second",
        "predicted_tokens_per_second_low", "predicted_tokens_per_second_high", "predicted_run_seconds",
    ),
    "totals": ("tokens_seen", "sequences_seen", "skipped_updates", "spikes", "incarnation"),
}  # fmt: skip
_PANEL_OF = {name: panel for panel, names in _PANELS.items() for name in names}
# The folders of the chart with both losses: the event and its value.
_LOSSES = {"train": (Event.STEP, "loss"), "validation": (Event.VALIDATION, "validation_loss")}


def _tag(name: str) -> str:
    """The chart of one of an event's values."""
    return f"{_PANEL_OF.get(name, 'system')}/{name}"


class Board:
    """Writes a run's events. They go on across incarnations as one curve: if the run resumes, those past `start` are
    purged, because they will be written again. Only the main rank has one. Its methods raise OSError."""

    def __init__(self, run: Path, start: Position, resumed: bool) -> None:
        self._run, self._start, self._resumed = run, start, resumed
        self._writers: dict[str, SummaryWriter] = {}
        # Up to version 0.1, a run had no folders for its losses: its log has them.
        missed = read(run) if resumed and not (run / "train").is_dir() else ()
        for folder in ("", *_LOSSES):
            if (run / folder).is_dir():
                self._writer(folder)
        for line in missed:
            self._losses(line["event"], line["tokens_seen"], line)

    def numbers(self, event: Event, at: Position, values: Line) -> None:
        """Chart the numbers of an event."""
        if event == Event.SKIPPED:  # the step's own line has its numbers
            return
        shown = {"tokens_seen": at.tokens, **values} if event == Event.STEP else values
        charts = {_tag(name): value for name, value in shown.items()}
        charts |= {f"exams/{task}": score.value for task, score in exam_scores(values).items()}
        for tag, value in charts.items():
            if isinstance(value, int | float):
                self._writer("").add_scalar(tag, value, at.step)
        self._losses(event, at.tokens, values)

    def text(self, name: str, markdown: str, step: int) -> None:
        """Show a text. The newest of those with the same name and step replaces the others."""
        self._writer("").add_text(name, markdown, step)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Never raises: an error of the disk was raised when the events were written."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()

    def _losses(self, event: str, tokens: int, values: Line) -> None:
        for folder, (kind, name) in _LOSSES.items():
            if event == kind:
                self._writer(folder).add_scalar("loss/by_tokens", float(values[name]), tokens)

    def _writer(self, folder: str) -> SummaryWriter:
        """Made on its first use: TensorBoard would list an empty folder as a run."""
        if folder not in self._writers:
            purge = (self._start.tokens if folder else self._start.step) + 1
            writer = SummaryWriter(str(self._run / folder), purge_step=purge if self._resumed else None)
            if self._resumed:
                # One of TensorBoard's loaders purges nothing at the first mark of a restart that it sees in a folder.
                restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                writer.file_writer.add_event(event_pb2.Event(step=purge, session_log=restart))  # type: ignore[attr-defined]
            self._writers[folder] = writer
        return self._writers[folder]
