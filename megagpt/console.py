"""Lines for people. Every rank calls `say`; only the main rank's process prints."""

import contextlib
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm

# Where `say` prints in this process: the stream's name, which is empty on a silent rank, and a prefix.
_voice = ("stdout", "")


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
    stream = getattr(sys, name)
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, errors="backslashreplace").decode(encoding), file=stream)
        stream.flush()
    except BrokenPipeError:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


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


def duration(seconds: float) -> str:
    """3 d 04:05:06; 04:05 if it is less than an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days = f"{hours // 24} d " if hours >= 24 else ""
    return f"{days}{hours % 24:02d}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"
