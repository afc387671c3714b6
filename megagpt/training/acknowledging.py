"""Answers a signal at once, from a thread: while the main thread is in a long step, or in a collective that never ends,
Python handles no signal."""

import contextlib
import os
import signal
import threading
from collections.abc import Collection, Iterator

from megagpt.errors import ExitCode

# Time that a second Ctrl-C leaves the main thread to end by itself (s).
_GRACE_SECONDS = 3.0


@contextlib.contextmanager
def acknowledging(signals: Collection[int], speaks: bool) -> Iterator[None]:
    """Say of the first of these signals what follows, if this process `speaks` for its job, and end the process after a
    second Ctrl-C even if the main thread cannot. For the main thread, whose handlers do the rest."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    left = threading.Event()
    thread = threading.Thread(target=_listen, args=(reader, signals, speaks, left), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # which ends the thread
        thread.join()
        os.close(reader)


def _listen(reader: int, signals: Collection[int], speaks: bool, left: threading.Event) -> None:
    came: list[int] = []
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in signals:
                continue
            first = not came or (number == signal.SIGINT and signal.SIGINT not in came)
            came.append(number)
            if first and speaks:
                again = "; Ctrl-C again ends at once without saving" if number == signal.SIGINT else ""
                _say(f"{signal.Signals(number).name}: stopping; the steps taken so far are saved first{again}")
            if came.count(signal.SIGINT) > 1 and not left.wait(_GRACE_SECONDS):
                os._exit(ExitCode.INTERRUPTED)


def _say(text: str) -> None:
    """A line on stderr, past Python's buffers, whose locks the main thread may hold."""
    with contextlib.suppress(OSError):
        # A terminal shows ^C or a progress bar on the line where the cursor is.
        os.write(2, f"{chr(10) if os.isatty(2) else ''}megagpt: {text}\n".encode())
