"""Errors that a user can cause, and the text helpers that make them useful."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user caused and can mend.

    The message says what was wrong, where (file, key, value) and what to do. The command line prints it
    alone, without a traceback, and exits with code 2.
    """


class Reported(UserError):
    """A UserError that some rank has printed already."""


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
