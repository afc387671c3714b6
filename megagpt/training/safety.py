"""Requests to stop a run: signals and a time limit."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Self

import psutil

from megagpt import launchers
from megagpt.training.acknowledging import acknowledging

# Requests to save and end: Ctrl-C, and the signals that schedulers send before they take a machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The reason of a stop that no signal asked for.
TIME_LIMIT = "train.time_limit"


class StopRequest:
    """Remembers signals, instead of dying of them, and knows the time limit; it is asked at the end of each step.
    Signals may come any number of times, because launchers and schedulers send them more than once. Only a second
    Ctrl-C interrupts at once. `time_limit`: seconds since this process began; 0: none."""

    def __init__(self, time_limit: float = 0) -> None:
        self.reason: str | None = None
        """The signal, or TIME_LIMIT, that came first."""
        self.time_limit = time_limit
        self._interrupted = False
        self._previous: dict[int, object] = {}
        self._acknowledging = contextlib.ExitStack()

    def requested(self, reserve: float = 0) -> bool:
        """Whether a signal came, or less than `reserve` seconds of the time limit are left."""
        if self.reason is None and self.time_limit and seconds_since_start() > self.time_limit - reserve:
            self.reason = TIME_LIMIT
        return self.reason is not None

    def signal(self) -> str | None:
        """The signal that came first, if one did before a time limit ended."""
        return None if self.reason == TIME_LIMIT else self.reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._acknowledging.enter_context(acknowledging(SIGNALS, launchers.speaks(os.environ)))
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._acknowledging.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.reason = self.reason or signal.Signals(number).name


def seconds_since_start() -> float:
    """Age of this process (s)."""
    return time.time() - psutil.Process().create_time()
