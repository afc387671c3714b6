"""Lines for people: on every rank `say` is called, and only the main rank's process prints."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class _Voice:
    """Where `say` prints in this process."""

    silent: bool = False
    to_stderr: bool = False
    prefix: str = ""


_voice = _Voice()


def say(text: str) -> None:
    """Print a line without tearing a progress bar. Neither a closed stdout (a launcher's ssh has ended) nor a
    character that the terminal cannot show may end a run."""
    if _voice.silent:
        return
    _print(_voice.prefix + text, to_stderr=_voice.to_stderr)


def warn(text: str) -> None:
    """Print a line to stderr, on any rank: for what must not mix with a command's result."""
    _print(text, to_stderr=True)


def _print(text: str, to_stderr: bool) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, errors="backslashreplace").decode(encoding), file=stream)
        stream.flush()
    except BrokenPipeError:
        quiet = open(os.devnull, "w")  # noqa: PTH123, SIM115
        if to_stderr:
            sys.stderr = quiet
        else:
            sys.stdout = quiet


@contextlib.contextmanager
def voice(silent: bool = False, to_stderr: bool = False, prefix: str = "") -> Iterator[None]:
    """Set where `say` prints in this process, for the duration of the block."""
    global _voice
    before, _voice = _voice, _Voice(silent, to_stderr, prefix)
    try:
        yield
    finally:
        _voice = before


def duration(seconds: float) -> str:
    """3 d 04:05:06; 04:05 if it is less than an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02d}:{m:02d}:{s:02d}"
    return f"{h:02d}:{m:02d}:{s:02d}" if h else f"{m:02d}:{s:02d}"
