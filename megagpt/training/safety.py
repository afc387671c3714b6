"""What interrupts a run: signals, and steps whose numbers are not finite."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from megagpt.errors import UserError


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them; the trainer asks `requested` between steps.

    A second Ctrl-C is taken at its word and interrupts at once. SIGTERM may come any number of times: launchers and
    schedulers send it more than once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class FiniteGuard:
    """Counts updates that were skipped because loss or gradient was not finite, and ends a run of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self._in_a_row = 0

    def check(self, updated: bool, step: int, last_good: Callable[[], str]) -> None:
        """Raises UserError after `limit` skipped updates in a row, with what `last_good` says of checkpoints."""
        if updated:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise UserError(
                f"loss or gradient was not finite in {self._in_a_row} steps in a row, the last of them step {step}; "
                f"{last_good()}: resume with a lower optimizer.lr"
            )
