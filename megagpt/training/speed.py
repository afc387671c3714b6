"""The speed that a run reports."""

import contextlib
import time
from collections.abc import Iterator


class Speed:
    """Times the steps from the end of one to the end of the next, so that whatever the loop does between them counts:
    the wait for data, the agreement of the ranks, logging. Only saves, validations, exams and samples are left out."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        """The end of the last step that was read, plus the pauses since then."""
        self._ended, self._steps, self._tokens = self._began, 0, 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what is done inside, between two steps."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def step(self, tokens: int) -> None:
        """A step of that many tokens has ended."""
        self._ended, self._steps, self._tokens = time.monotonic(), self._steps + 1, self._tokens + tokens

    def read(self) -> tuple[float, float]:
        """Seconds a step and tokens a second, over the steps since the last reading, at least one."""
        seconds, steps, tokens = self._ended - self._began, self._steps, self._tokens
        self._began, self._steps, self._tokens = self._ended, 0, 0
        return seconds / steps, tokens / seconds
