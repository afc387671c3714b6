"""What several commands' options share."""

import argparse
from collections.abc import Callable
from typing import Protocol

Command = Callable[[argparse.Namespace], int]


class Add(Protocol):
    """Adds a command to the command line and gives its parser."""

    def __call__(self, name: str, command: Command, text: str) -> argparse.ArgumentParser: ...


def count(text: str) -> int:
    """A whole number above 0, which may be written 1e8 or 100_000_000."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = -1.0
    if value < 1 or not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(value)
