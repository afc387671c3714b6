"""Errors that a user can cause, and the text helpers that make them useful."""

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user caused and can mend.

    The message says what was wrong, where (file, key, value) and what to do. The command line prints it
    alone, without a traceback, and exits with code 2.
    """


class Reported(UserError):
    """A UserError that some rank has printed already."""


class PassingError(UserError):
    """What may be gone at the next try without anybody's doing: a disk or network that failed for a while."""


class Interrupted(UserError):
    """Stopped by Ctrl-C, with a word on how to go on."""


_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)


def disk_error(error: OSError) -> UserError | None:
    """The disk's doing as a UserError; None for what is a fault of this program and keeps its traceback."""
    if error.errno not in _DISK_ERRORS:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return UserError(f"{where}{os.strerror(error.errno)}; mend that and go on")


def disk_reason(*causes: BaseException) -> str:
    """Why a disk did not take something, for a sentence about it: one cause, or one from each rank."""
    if any(isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT) for c in causes):
        return "disk full; free some space and resume"
    return first_line(causes[0])


def of_disk_error(text: str, *causes: OSError) -> UserError:
    """What to raise for such causes: a full or read-only disk stays as it is until someone mends it; others pass."""
    lasting = any(cause.errno in _DISK_ERRORS for cause in causes)
    return UserError(text) if lasting else PassingError(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known words, or all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "valid: " + ", ".join(known)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, with its type, for use inside a one-line message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
