"""Errors that end a command with one line, the exit codes, and the text helpers that make messages useful."""

import difflib
import enum
import errno
import os
from collections.abc import Iterable
from typing import ClassVar


class ExitCode(enum.IntEnum):
    """Exit codes of the process."""

    DONE = 0
    DIFFERENT = 1
    """A measurement left its tolerance, a checkpoint is corrupt, or a job must not be started again."""
    FAILED = 2
    """An expected error, named in one line."""
    HUNG = 3
    """A rank made no progress; the stacks of all ranks are in the run's folder."""
    STOPPED = 75
    """Stopped by a signal or a time limit, saved, resumable (EX_TEMPFAIL of sysexits.h)."""
    INTERRUPTED = 130
    """Ctrl-C, as shells report it."""


class ExpectedError(Exception):
    """Ends the command with its message alone: what was wrong, where (file, key, value), and what to do."""

    code: ExitCode = ExitCode.FAILED
    retry: ClassVar[bool] = False
    """Whether the same command may succeed later although nobody changed anything."""


class UserError(ExpectedError):
    """The user caused it and can fix it. A retry would fail in the same way."""


class NonFiniteError(UserError):
    """A weight or a logit is NaN or infinite."""


class Killed(UserError):
    """A rank died of SIGKILL: of the kernel's, because memory was full, or of somebody's."""


class TransientError(ExpectedError):
    """A disk or a network failed for a while: a retry may succeed without any change."""

    retry = True


class NoNetwork(UserError):
    """A host cannot be reached from here, or must not be asked."""


class Reported(ExpectedError):
    """An error that some rank has printed already."""

    def __init__(self, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__()
        self.code = code


class Interrupted(ExpectedError):
    """Stopped by Ctrl-C; the message says how to continue."""

    code = ExitCode.INTERRUPTED


class Stopped(ExpectedError):
    """Stopped by a scheduler's signal before there was anything to save: the same command may succeed later."""

    code = ExitCode.STOPPED
    retry = True


# Causes that a person must remove: a retry on the same disk fails again.
_LASTING = {getattr(errno, n) for n in ["ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST"]}


def expected(error: BaseException) -> ExpectedError | None:
    """The error as one that ends in one line; None if it is a fault of this program, which keeps its traceback."""
    if isinstance(error, ExpectedError):
        return error
    if isinstance(error, OSError) and error.errno in _LASTING:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(f"{where}{os.strerror(error.errno or 0)}; fix this, then run the same command again")
    return None


def disk_reason(*causes: BaseException) -> str:
    """Why a disk refused something, as part of a sentence. `causes`: one, or one from each rank."""
    if any(isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT) for c in causes):
        return "disk full; free some space and resume"
    return first_line(causes[0])


def disk_error(text: str, *causes: OSError) -> ExpectedError:
    """The error to raise for these causes: full and read-only disks need a person, other errors are retried."""
    return UserError(text) if any(cause.errno in _LASTING for cause in causes) else TransientError(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, or all of them if none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """The type and the first line of an exception's text, for use inside a one-line message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
