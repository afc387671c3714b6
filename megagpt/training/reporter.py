"""Writes a run's numbers everywhere: to the run log, to TensorBoard and to the console."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megagpt.console import duration, say
from megagpt.position import Position
from megagpt.run_log import Event, RunLog
from megagpt.training.board import Board

# Seconds between two progress lines, if there is no terminal for a bar.
_LINE_SECONDS = 10.0


class Reporter:
    """Writes on the main rank; on the others it does nothing."""

    def __init__(
        self, run: Path, start: Position, total_tokens: int, resumed: bool, is_main: bool, went_back: bool = False
    ) -> None:
        self._start, self._total = start, total_tokens
        self._step: tuple[Position, dict[str, Any]] | None = None
        self._began, self._last_line = time.monotonic(), 0.0
        self._bar: tqdm[Any] | None = None
        self._log = RunLog(run, start.tokens, went_back) if is_main else None
        if self._log is None:
            return
        with self._log.disk_errors():
            self._board = Board(run, start, resumed)
        if sys.stderr.isatty():
            look: Any = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True, "smoothing": 0.05}
            self._bar = tqdm(total=total_tokens, initial=start.tokens, **look)
        self._usual_hook, threading.excepthook = threading.excepthook, self._hook  # last: `close` takes it back

    def event(self, event: Event, at: Position, values: dict[str, Any], text: str = "") -> None:
        """An event, with its line for people. Raises ExpectedError if the disk refuses it."""
        if self._log is None:
            return
        self.write_step()
        self._log.append(event, at.step, at.tokens, values)
        with self._log.disk_errors():
            self._board.numbers(event, at, values)
            self._board.flush()
        if text:
            say(text)

    def step(self, at: Position, values: dict[str, Any]) -> None:
        """The numbers of one optimizer step; `None` is shown as n/a. They are written when `write_step` or anything
        else is called, so that a GPU need not wait for it between two steps."""
        self._step = (at, values)

    def forget_step(self) -> None:
        """Leave the last step's numbers unwritten: the log belongs to a newer incarnation."""
        self._step = None

    def write_step(self) -> None:
        """Write the numbers of the last step, if they are not written yet. A step is taken again after a kill, so they
        are not forced to the disk. Raises ExpectedError if the disk refuses them."""
        if self._log is None or self._step is None:
            return
        (at, values), self._step = self._step, None
        self._log.append(Event.STEP, at.step, at.tokens, values)
        with self._log.disk_errors():
            self._board.numbers(Event.STEP, at, values)
        if self._bar is not None:
            self._bar.set_postfix_str(f"step {at.step} loss {values['loss']:.4f} lr {values['lr']:.2e}", refresh=False)
            self._bar.update(at.tokens - self._bar.n)
        elif time.monotonic() - self._last_line > _LINE_SECONDS or at.step == 1 or at.last:
            self._last_line = time.monotonic()
            mfu = "n/a" if values["mfu"] is None else f"{values['mfu']:.1%}"
            say(
                f"step {at.step} | {at.tokens / self._total:.1%} | loss {values['loss']:.4f} | lr {values['lr']:.2e} | "
                f"gradient norm {values['gradient_norm']:.2f} | {values['tokens_per_second']:,.0f} tok/s | "
                f"MFU {mfu} | ETA {self._eta(at)}"
            )

    def _eta(self, at: Position) -> str:
        done = at.tokens - self._start.tokens
        return duration((time.monotonic() - self._began) / done * (self._total - at.tokens)) if done > 0 else "?"

    def text(self, at: Position, name: str, text: str) -> None:
        """A text for TensorBoard, which takes it as Markdown."""
        if self._log is not None:
            self.write_step()
            with self._log.disk_errors():
                self._board.text(name, text, at.step)
                self._board.flush()

    def flush(self) -> None:
        """Write TensorBoard's events to the disk, so that none before a checkpoint's position is missing."""
        if self._log is not None:
            self.write_step()
            with self._log.disk_errors():
                self._board.flush()

    def close(self) -> None:
        try:
            self.write_step()
        finally:
            if self._bar is not None:
                self._bar.close()
            if self._log is not None:
                self._log.close()
                self._board.close()
                threading.excepthook = self._usual_hook

    def _hook(self, arguments: threading.ExceptHookArgs) -> None:
        """Print no traceback for a disk error in TensorBoard's thread: the next call of the writer raises it again."""
        is_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            self._usual_hook(arguments)
