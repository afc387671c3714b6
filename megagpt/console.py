"""Lines for people. Every rank calls `say`; only the main rank's process prints."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

# Where `say` prints in this process: the stream's name, which is empty on a silent rank, and a prefix.
_voice = ("stdout", "")
# Also gets each line that this process prints.
_listener: Callable[[str], object] | None = None


def prepare_streams() -> None:
    """Make stdout and stderr safe for any text: a character that they cannot encode is shown as an escape, and a stream
    that the caller has closed leads nowhere. Without the latter, the next file that is opened would get its number, and
    libraries write their warnings to number 2."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            _silence(name)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_unread() -> bool:
    """Whether the reader of stdout has left."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # a stand-in without a number
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def drop_unread() -> None:
    """Drop what stdout does not take: Python would fail with it at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence("stdout")


def _silence(name: str) -> None:
    setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def say(text: str) -> None:
    """Print a line without tearing a progress bar. Neither a closed stdout (a launcher's ssh has ended) nor a
    character that the terminal cannot show may end a run."""
    stream, prefix = _voice
    if stream:
        _print(prefix + text, stream)


def warn(text: str) -> None:
    """Print a line to stderr, on any rank: for lines that must not mix with a command's output."""
    _print(text, "stderr")


def _print(text: str, name: str) -> None:
    if _listener is not None:
        _listener(text)
    stream = getattr(sys, name)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        tqdm.write(text.encode(encoding, errors="backslashreplace").decode(encoding), file=stream)
        stream.flush()
    except OSError:  # a pipe without a reader, a terminal that is gone, a full disk
        _silence(name)


@contextlib.contextmanager
def voice(silent: bool = False, to_stderr: bool = False, prefix: str = "") -> Iterator[None]:
    """Set where `say` prints in this process, for the duration of the block."""
    global _voice
    stream = "stderr" if to_stderr else "stdout"
    before, _voice = _voice, ("" if silent else stream, prefix)
    try:
        yield
    finally:
        _voice = before


@contextlib.contextmanager
def overheard(listener: Callable[[str], object]) -> Iterator[None]:
    """Give each line that this process prints to a function, too, for the duration of the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def duration(seconds: float) -> str:
    """3 d 04:05:06; 04:05 if it is less than an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days = f"{hours // 24} d " if hours >= 24 else ""
    return f"{days}{hours % 24:02d}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"
