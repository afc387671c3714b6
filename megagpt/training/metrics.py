"""What is measured, and the places it is written: console, TensorBoard, JSON lines."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megagpt.errors import disk_error, disk_reason

_PLAIN_SECONDS = 10.0


class Metrics:
    """The writers of one run. Only the main rank makes one.

    All places continue across restarts: lines and events past the resumed position are dropped, because they will be
    written again.
    """

    def __init__(self, run: Path, total_tokens: int, tokens: int, step: int, resumed: bool) -> None:
        self.file = run / "metrics.jsonl"
        _drop_lines_after(self.file, tokens)
        self.lines = self.file.open("a", encoding="utf-8")
        _leave_disk_errors_to_the_next_write()
        self.board = SummaryWriter(str(run), purge_step=step + 1 if resumed else None)
        self.total_tokens = total_tokens
        self._start = time.monotonic()
        self._first_tokens = tokens
        self._last_line = 0.0
        self.bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total_tokens, initial=tokens, unit="tok", unit_scale=True, dynamic_ncols=True, smoothing=0.05
            )

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Scalars of one optimizer step; `None` is written as null and shown as n/a."""
        self._write(step, "step", values)
        tokens = values["tokens_seen"]
        if self.bar is not None:
            self.bar.set_postfix_str(f"step {step} loss {values['loss']:.4f} lr {values['lr']:.2e}", refresh=False)
            self.bar.update(tokens - self.bar.n)
        elif time.monotonic() - self._last_line > _PLAIN_SECONDS or step == 1 or tokens >= self.total_tokens:
            self._last_line = time.monotonic()
            mfu = "n/a" if values["mfu"] is None else f"{values['mfu']:.1%}"
            self.say(
                f"step {step} | {tokens / self.total_tokens:.1%} | loss {values['loss']:.4f} | lr {values['lr']:.2e} | "
                f"gradient norm {values['gradient_norm']:.2f} | {values['tokens_per_second']:,.0f} tok/s | "
                f"MFU {mfu} | ETA {self._eta(tokens)}"
            )

    def _eta(self, tokens: int) -> str:
        done = tokens - self._first_tokens
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self._start) / done * (self.total_tokens - tokens))

    def event(self, step: int, kind: str, values: dict[str, Any], text: str) -> None:
        """Something that happens now and then (validation, a save, a restart), with its line for people."""
        self._write(step, kind, values)
        self.say(text)

    def note(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Something for machines only."""
        self._write(step, kind, values)

    def text(self, step: int, name: str, text: str) -> None:
        """A text panel of TensorBoard."""
        self.board.add_text(name, text, step)

    def say(self, text: str) -> None:
        """A line for people that does not tear the progress line."""
        tell(text)

    def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        line = json.dumps({"event": kind, "step": step, **{k: _json(v) for k, v in values.items()}})
        try:
            self.lines.write(line + "\n")
            self.lines.flush()
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{_panel(name)}/{name}", value, step)
        except OSError as error:
            text = f"{self.file.parent}: metrics cannot be written: {disk_reason(error)}"
            raise disk_error(text, error) from None

    def has(self, event: str, tokens: int) -> bool:
        """Whether an event of that kind and position stands in the run's metrics."""
        lines = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
        return any(line["event"] == event and line["tokens_seen"] == tokens for line in lines)

    def flush(self) -> None:
        """Put on disk what a checkpoint's position claims to be there."""
        self.board.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for writer in (self.lines, self.board):
            with contextlib.suppress(OSError):  # what could not be written was said when it was written
                writer.close()


def tell(text: str) -> None:
    """Print a line. That nobody reads it any more, such as the ssh of a launcher that was stopped, ends no run."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _leave_disk_errors_to_the_next_write() -> None:
    """TensorBoard's thread hands its error to whoever writes next; Python would print it as a traceback before."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (type(arguments.thread).__name__ == "_AsyncWriterThread" and isinstance(arguments.exc_value, OSError)):
            usual(arguments)

    threading.excepthook = hook


def _panel(name: str) -> str:
    if name.startswith("ranks_"):
        return "ranks"
    if "loss" in name:
        return "loss"
    if name in ("lr", "gradient_norm", "batch_tokens", "skipped_updates", "loss_scale"):
        return "optimizer"
    return "progress" if name.endswith("seen") or name == "incarnation" else "speed"


def _json(value: Any) -> Any:
    # JSON has no NaN; a number that is not finite is written as its name.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _drop_lines_after(path: Path, tokens: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["tokens_seen"] > tokens:
                continue
        except (ValueError, KeyError):
            continue  # the line that a kill cut off
        kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def duration(seconds: float) -> str:
    """3 d 04:05:06, or 04:05 where there are no hours."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d}:{m:02d}:{s:02d}"
    return f"{h:02d}:{m:02d}:{s:02d}" if h else f"{m:02d}:{s:02d}"
